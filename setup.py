"""Packaging of keras_fa. Tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages
from setuptools import setup

JAX = ["jax>=0.10.2"]
TENSORFLOW = ["tensorflow>=2.21"]
TORCH = ["torch>=2.13"]
# Of train/, on any backend.
PROGRAMS = [
    "absl-py>=2.3",
    "filelock>=3.20",
    "matplotlib>=3.10",
    "scikit-learn>=1.7",
    "tabulate>=0.9",
]
TRAIN = [
    *PROGRAMS,
    *TENSORFLOW,
    "importlib_resources>=6.5",  # tensorflow-datasets imports it undeclared
    "tensorboard>=2.21",  # tensorflow 2.21 no longer brings it
    "tensorflow-datasets>=4.9.10",
]
PYTEST = ["pytest>=8", "pytest-xdist>=3.8"]
TEST = [*TRAIN, *JAX, *PYTEST, "ruff>=0.14"]
HUB = ["keras-hub>=0.32"]  # brings tensorflow-text, which is large
DOCS = ["mkdocs>=1.6,<2", "mkdocstrings[python]>=1.0"]

setup(
    name="keras_fa",
    version="0.1.0",
    description="Feedback alignment for Keras 3",
    long_description=Path(__file__).with_name("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author="The keras_fa developers",
    project_urls={"Paper": "https://arxiv.org/abs/1812.06488"},
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords="feedback alignment, keras, credit assignment, neuroscience",
    packages=find_packages(include=["keras_fa", "keras_fa.*"]),
    package_data={"keras_fa": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=["keras>=3.15", "numpy"],
    extras_require={
        "tensorflow": TENSORFLOW,
        "jax": JAX,
        "torch": TORCH,
        "programs": PROGRAMS,
        "train": TRAIN,
        "pytest": PYTEST,
        "test": TEST,
        "hub": HUB,
        "docs": DOCS,
    },
)
