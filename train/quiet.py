"""Imports TensorFlow without its start-up chatter.

Some of its C++ lines are written before any log setting is read, so that
standard error itself is shut during the import. Import this module first.
"""

import os
import sys

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
