"""What comes before all other imports.

This checkout's own package is found, installed or not. Keras is imported, and
with it its backend: TensorFlow where it is installed, else JAX, else PyTorch,
unless the environment variable KERAS_BACKEND or Keras's own settings say
otherwise.
TensorFlow uses oneDNN on any CPU, unless TF_ENABLE_ONEDNN_OPTS says otherwise.
A GPU's memory is taken as it is needed, so that several runs can share it,
unless TF_FORCE_GPU_ALLOW_GROWTH or XLA_PYTHON_CLIENT_PREALLOCATE say otherwise.
"""

import contextlib
import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

BACKENDS = ("tensorflow", "jax", "torch")


def installed(*packages: str) -> bool:
    """Whether all of some packages are there, without importing them."""
    return all(importlib.util.find_spec(package) for package in packages)


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of some packages."""
    return {
        "python": platform.python_version(),
        **{p: importlib.import_module(p).__version__ for p in packages},
    }


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Shuts standard error itself, file descriptor and all.

    Some C++ lines of TensorFlow are written before any log setting is read.
    """
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    sys.stderr.flush()
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# On CPUs without AVX-512 TensorFlow leaves it off, at half the speed.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if not installed("tensorflow"):
    _other = "jax" if installed("jax") or not installed("torch") else "torch"
    os.environ.setdefault("KERAS_BACKEND", _other)

_wrong = None
try:
    with silence():
        import keras

        if installed("tensorflow"):
            # On JAX, too: Keras's image layers and TensorBoard import it.
            import tensorflow as tf
    if keras.backend.backend() not in BACKENDS:
        _wrong = f"Keras runs on {keras.backend.backend()}"
except (ImportError, ValueError) as error:
    _wrong = f"Keras cannot be imported ({' '.join(str(error).split())})"
if _wrong:
    sys.exit(
        f"{Path(sys.argv[0]).name}: {_wrong}. Install one of "
        f"{', '.join(BACKENDS)}, and set KERAS_BACKEND to it."
    )
if installed("tensorflow"):
    tf.get_logger().setLevel("ERROR")
    if keras.backend.backend() != "tensorflow":
        tf.config.set_visible_devices([], "GPU")  # it would take all of it
