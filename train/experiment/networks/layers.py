"""The layers that networks are written with: he_normal kernels, names."""

import random

import keras
from keras import KerasTensor
from keras.layers import BatchNormalization
from keras.layers import Conv2D
from keras.layers import Dense
from keras.layers import Dropout
from keras.layers import GlobalAveragePooling2D


def conv(
    name: str, filters: int, size: int, strides: int = 1, padding: str = "same"
) -> Conv2D:
    return Conv2D(
        filters,
        size,
        strides=strides,
        padding=padding,
        activation="relu",
        kernel_initializer="he_normal",
        name=name,
    )


def dense(name: str, units: int) -> Dense:
    return Dense(
        units, activation="relu", kernel_initializer="he_normal", name=name
    )


def logits(name: str, classes: int) -> Dense:
    return Dense(
        classes, kernel_initializer="he_normal", dtype="float32", name=name
    )


def seeded_dropout(name: str, rate: float) -> Dropout:
    # Without a seed, on PyTorch it draws from what no checkpoint holds.
    on_torch = keras.backend.backend() == "torch"
    seed = random.randint(1, 10**9) if on_torch else None
    return Dropout(rate, seed=seed, name=name)


def drop(x: KerasTensor, rate: float) -> KerasTensor:
    return seeded_dropout("dropout", rate)(x) if rate else x


def normalization(name: str) -> BatchNormalization:
    return BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_bn")


def normalized(
    name: str, x: KerasTensor, filters: int, size: int, strides: int = 1
) -> KerasTensor:
    x = Conv2D(
        filters,
        size,
        strides=strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        name=name,
    )(x)
    return normalization(name)(x)


def mean_logits(x: KerasTensor, classes: int, dropout: float) -> KerasTensor:
    x = GlobalAveragePooling2D(name="mean")(x)
    return logits("fc", classes)(drop(x, dropout))
