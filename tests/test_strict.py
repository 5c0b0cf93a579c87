"""Strict normalization of kernels with zeros, which carry no error."""

from collections.abc import Callable

import backends
import numpy as np
import pytest
import references
from keras import ops

from keras_fa.constraints import SignConcordance


@pytest.mark.parametrize("shape", [(5, 3), (2, 2, 3, 4)])
@pytest.mark.parametrize(
    "wrap",
    [lambda rule: rule, lambda rule: backends.compiled(rule, [])],
    ids=["eager", "compiled"],
)
def test_weights_that_carry_error_share_the_norm(
    wrap: Callable, shape: tuple
) -> None:
    """`B = ||W|| sign(W) / ||sign(W)||`, over the weights that are not 0."""
    w = references.normal(shape, 1)
    w.flat[::3] = 0.0
    strict = SignConcordance(strict=True)
    rule = wrap(lambda kernel: strict(None, kernel))
    b = references.array(rule(ops.convert_to_tensor(w)))
    norm = np.linalg.norm(w)
    wanted = norm * np.sign(w) / np.sqrt(np.count_nonzero(w))
    references.assert_close(b, wanted)
    np.testing.assert_allclose(np.linalg.norm(b), norm, rtol=1e-5)
