"""Fixtures of all tests: two logical CPUs, one strategy, fixed seeds."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest
import tensorflow as tf


def pytest_configure() -> None:
    # Before TensorFlow touches its devices.
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 2,
    )


@pytest.fixture(scope="session")
def strategy() -> tf.distribute.Strategy:
    """Two replicas. One object a process: TensorFlow dies of a second."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture(autouse=True)
def seed() -> None:
    keras.utils.set_random_seed(0)
