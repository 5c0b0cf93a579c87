"""What comes before all other imports.

This checkout's own package is found, installed or not. TensorFlow is imported
without its start-up chatter: some of its C++ lines are written before any log
setting is read, so that standard error itself is shut during the import.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

_stderr = os.dup(2)
_nowhere = os.open(os.devnull, os.O_WRONLY)
sys.stderr.flush()
os.dup2(_nowhere, 2)
try:
    import tensorflow as tf
finally:
    os.dup2(_stderr, 2)
    os.close(_stderr)
    os.close(_nowhere)

tf.get_logger().setLevel("ERROR")
