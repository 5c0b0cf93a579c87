"""What others published, to stand beside our figures: errors in percent.

`PAPER` is the table of Moskovitz, Litwin-Kumar, Abbott, "Feedback alignment
in deep convolutional networks" (arXiv 1812.06488, 2018), as a review of the
paper prints it: test error, on ImageNet top-1. The review prints the three
Const. figures under ImageNet 1; they only make sense beside BP's 45.5 under
ImageNet 2, as its text says that constant forward norms improved FA-uSF, and
stand there here. DFA and DenseFA were not run on larger networks, for memory.

`OTHERS` is what others measured with the same rule and the same network:

- BioTorch's benchmark: CIFAR-10 by 250 epochs of SGD with batches of 128, one
  seed. Its frSF, `B = |B_0| sign(W)`, is FA-uSF Init. Left out are its uSF,
  of one fixed magnitude, which is another rule than ours; its LeNet, which is
  not CIFAR-10 1; and, for now, the figures of its brSF.
- A reproduction of the paper's CIFAR-10 1: 50 epochs of Adam, one seed.
"""

from collections.abc import Container
from typing import NamedTuple

from keras_fa.methods import METHODS

Task = tuple[str, str]  # data set and network


class Published(NamedTuple):
    """The figures of one source for one column.

    Attributes:
        source: What heads its column in our table.
        errors: Method to error in percent.
        decimals: That the source prints.
        about: What to know of its figures, in a sentence.
    """

    source: str
    errors: dict[str, float]
    decimals: int
    about: str


TITLES: dict[Task, str] = {
    ("mnist", "mnist"): "MNIST",
    ("cifar10", "cifar10_1"): "CIFAR-10 1",
    ("cifar10", "cifar10_2"): "CIFAR-10 2",
    ("imagenet2012", "imagenet_1"): "ImageNet 1",
    ("imagenet2012", "imagenet_2"): "ImageNet 2",
}

_ROWS: dict[str, tuple[float | None, ...]] = {
    "bp": (0.8, 17.2, 11.0, 79.5, 45.5),
    "bp_noise": (0.8, 17.4, 11.0, 79.2, 46.0),
    "bp_alignment": (0.9, 17.4, 11.2, 79.4, 45.9),
    "fa": (1.1, 26.6, 35.6, 95.2, 94.5),
    "fa_usf_init_ei": (0.9, 18.9, 17.8, 86.9, 67.8),
    "fa_usf_init": (0.7, 17.6, 13.1, 79.6, 60.1),
    "fa_usf_sn": (0.7, 17.7, 12.6, 78.9, 54.4),
    "dfa": (1.0, 28.6, None, None, None),
    "dense_fa": (0.7, 16.9, None, None, None),
    "bp_const": (None, None, None, None, 46.9),
    "fa_usf_const": (None, None, None, None, 51.2),
    "fa_usf_const_ei": (None, None, None, None, 66.1),
}

_ABOUT = "paper: Moskovitz et al. (2018)"
_OUR_NETWORK = f"{_ABOUT}, whose network is not known in detail; ours is "
_ABOUT_PAPER = {
    ("mnist", "mnist"): f"{_ABOUT}.",
    ("cifar10", "cifar10_1"): f"{_ABOUT}.",
    ("cifar10", "cifar10_2"): f"{_OUR_NETWORK}All-CNN-C.",
    ("imagenet2012", "imagenet_1"): f"{_OUR_NETWORK}a small "
    "convnet after Bartunov et al. (2018).",
    ("imagenet2012", "imagenet_2"): f"{_OUR_NETWORK}AlexNet without local "
    "response normalization. The source prints the Const. figures under "
    "ImageNet 1, where they make no sense.",
}

PAPER: dict[Task, Published] = {
    column: Published(
        "paper",
        {
            method: row[index]
            for method, row in _ROWS.items()
            if row[index] is not None
        },
        1,
        _ABOUT_PAPER[column],
    )
    for index, column in enumerate(TITLES)
}

_BIOTORCH = "BioTorch: one seed"
_BIOTORCH_CIFAR10 = (
    f"{_BIOTORCH}, 250 epochs of SGD. FA-uSF Init. is what it calls frSF."
)

OTHERS: dict[Task, Published] = {
    ("cifar10", "resnet20"): Published(
        "BioTorch",
        {"bp": 8.63, "fa": 32.16, "dfa": 45.94, "fa_usf_init": 11.2},
        2,
        _BIOTORCH_CIFAR10,
    ),
    ("cifar10", "resnet56"): Published(
        "BioTorch",
        {"bp": 8.3, "fa": 34.88, "dfa": 38.01, "fa_usf_init": 9.49},
        2,
        _BIOTORCH_CIFAR10,
    ),
    ("imagenet2012", "resnet18"): Published(
        "BioTorch",
        {"bp": 30.39, "fa": 85.25, "dfa": 82.45, "fa_usf_init": 36.5},
        2,
        f"{_BIOTORCH}. FA-uSF Init. is what it calls frSF.",
    ),
    ("cifar10", "cifar10_1"): Published(
        "reproduction",
        {"bp": 24.2, "fa": 59.9, "fa_usf_init": 25.7, "fa_usf_sn": 24.3},
        1,
        "reproduction: of the paper by others, one seed, 50 epochs of Adam.",
    ),
}


def published(column: Task) -> list[Published]:
    """The sources that have figures for a column, the paper first."""
    return [source[column] for source in (PAPER, OTHERS) if column in source]


def rows_of(column: Task, ours: Container[str]) -> list[str]:
    """The methods that we or others have figures of, in the paper's order."""
    sources = published(column)
    return [
        method
        for method in METHODS
        if method in ours or any(method in s.errors for s in sources)
    ]
