"""Fixtures of all tests: fixed seeds; on TensorFlow two logical CPUs."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# As the programs in train/, so that a run in here equals one out there.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
if os.environ.get("KERAS_BACKEND") == "torch":
    # Its threads wait for each other busily, and tests run side by side.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# JAX compiles every small operation: with few passes, and none of them twice.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax"),
)

import keras
import pytest
from backends import ON_TENSORFLOW
from backends import ON_TORCH

# What depends on no backend, and is tested on TensorFlow.
collect_ignore = (
    []
    if ON_TENSORFLOW
    else [
        "test_benchmark.py",
        "test_networks.py",
        "test_report.py",
        "test_reproduce.py",
        "test_settings.py",
    ]
)


# What is left out on PyTorch, by the test's name, and why.
NOT_ON_TORCH = {
    "test_the_error_can_be_differentiated": "refused: there is one derivative",
    "test_jit_compiled_fit_equals_plain_fit": "minutes of torch.compile",
    "test_other_backends[numpy-main.py]": "Keras's numpy backend imports jax",
    # Keras refuses it on PyTorch.
    **dict.fromkeys(
        (
            "test_the_phase_comes_after_so_many_updates[2-3-None-wanted2]",
            "test_the_phase_comes_after_so_many_updates[4-3-None-wanted3]",
            "test_the_callback_makes_a_training_of_init_one_of_sn[2-False]",
            "test_the_callback_makes_a_training_of_init_one_of_sn[4-True]",
            "test_steps_of_one_execution_are_one",
            "test_steps_per_execution_change_nothing",
            "test_bad_input[--batch_size=600 --steps_per_execution=3 "
            "--method=bp-1293]",
        ),
        "steps_per_execution above 1",
    ),
}


# What is run on the other backends unless `-m slow` asks for the rest: what
# comes of the package's own lines for a backend; the rest is Keras's operations
# and Python, and is tested on TensorFlow. On both: each layer kind against its
# reference, what a step computes and what it costs, each method after training,
# direct errors, and runs that are resumed.
_PROVE = {
    "test_attention.py",
    "test_constraints.py",
    "test_cost.py",
    "test_layers.py",
    "test_methods.py",
    "test_optimizers.py",
    "test_recurrent.py",
    "test_wiring.py",
    "test_file_of_arrays",
    "test_resumed_run_equals_uninterrupted_one",
}
PROVE = {
    # Besides, what its steps hold as constants and take and give as state, and
    # devices.
    "jax": {
        *_PROVE,
        "test_averages.py",
        "test_callbacks.py",
        "test_distribution.py",
        "test_jax.py",
        "test_learning.py",
        "test_state.py",
        "test_measures_against_numpy",
        "test_masks_are_shared_and_nothing_moves",
    },
    # Besides, `state_dict`, `to` and random states outside of variables.
    "torch": {*_PROVE, "test_torch.py"},
}


@pytest.hookimpl(tryfirst=True)  # before what -m leaves out is left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    proven = PROVE.get(keras.backend.backend())
    for item in items:
        names = (item.path.name, item.originalname)
        if proven is not None and proven.isdisjoint(names):
            item.add_marker(pytest.mark.slow)
    for item in items if ON_TORCH else ():
        reason = NOT_ON_TORCH.get(
            item.name, NOT_ON_TORCH.get(item.originalname)
        )
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """What the libraries have made stays: the collector need not look at it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def pytest_configure() -> None:
    if not ON_TENSORFLOW:
        return
    import tensorflow as tf

    _optimize_graphs(False)

    # Before TensorFlow touches its devices.
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 2,
    )


def _optimize_graphs(on: bool) -> None:
    import tensorflow as tf

    tf.config.optimizer.set_experimental_options(
        {"disable_meta_optimizer": not on}
    )


@pytest.fixture(scope="module")
def optimized_graphs() -> Iterator[None]:
    """TensorFlow's graphs are optimized, as they are outside of these tests.

    For what an optimized graph could break, the order of a step's reads and
    writes first of all, and for programs that equal others in processes of
    their own. Elsewhere a graph that runs a few times is not worth it.
    """
    if not ON_TENSORFLOW:
        yield
        return
    _optimize_graphs(True)
    yield
    _optimize_graphs(False)


@pytest.fixture(scope="session")
def strategy() -> Any:
    """Two replicas. One object a process: TensorFlow dies of a second."""
    if not ON_TENSORFLOW:
        pytest.skip("a tf.distribute.Strategy is TensorFlow's own")
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture(autouse=True)
def seed() -> None:
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def dtype_policy() -> Iterator[None]:
    """float32 for the next test, whatever this one, or its run, has set."""
    yield
    keras.config.set_dtype_policy("float32")
