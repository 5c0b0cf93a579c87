"""All that tests need of a backend beside Keras: gradients and compilation.

The same names on TensorFlow, JAX and PyTorch, written without `keras_fa`.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
ON_JAX = keras.backend.backend() == "jax"
ON_TORCH = keras.backend.backend() == "torch"
requires_tensorflow = pytest.mark.skipif(
    not ON_TENSORFLOW, reason="about TensorFlow itself"
)
# What it consists of is tested part by part on every backend.
long_on_jax = pytest.mark.skipif(
    ON_JAX, reason="minutes of compiling small programs on JAX"
)


def array(value: Any) -> np.ndarray:
    """A variable or tensor as a NumPy array of its own."""
    return np.array(ops.convert_to_numpy(value))


def vjp(
    owner: keras.layers.Layer | None,
    function: Callable[..., Any],
    inputs: Sequence[Any] = (),
    dy: Any = None,
    variables: Sequence[keras.Variable] | None = None,
) -> tuple[Any, list, list]:
    """Where an error at the output of a function goes.

    Args:
        owner: The layer or model that `function` calls, if it calls one. Its
            state (statistics, random state) moves on as in any call.
        function: A function of tensors that returns a tensor.
        inputs: Its arguments: arrays or tensors.
        dy: The error at its output. Default: ones.
        variables: Variables of the owner. Default: the trainable ones.

    Returns:
        The output, the errors of the inputs and the gradients of the
        variables: tensors, of zeros where nothing depends on them.
    """
    if variables is None:
        variables = [] if owner is None else owner.trainable_variables
    inputs = [ops.convert_to_tensor(x) for x in inputs]
    return _vjp(owner, function, inputs, dy, list(variables))


if ON_TENSORFLOW:
    import tensorflow as tf

    def _vjp(owner, function, inputs, dy, variables):
        values = [variable.value for variable in variables]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y = function(*inputs)
        gradients = tape.gradient(
            y,
            [*inputs, *values],
            None if dy is None else tf.cast(dy, y.dtype),
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return y, gradients[: len(inputs)], gradients[len(inputs) :]

    def compiled(
        function: Callable, variables: Sequence[keras.Variable]
    ) -> Callable:
        """A function of tensors, compiled at its first call.

        Args:
            function: It may read and assign Keras variables.
            variables: All variables that it reads.
        """
        return tf.function(function)

    def synchronize(model: keras.Model) -> None:
        """Lets a callback see the variables after a batch."""

    class OwnStep:
        """A model's training step as a user writes it."""

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(y=y, y_pred=self(x))
            variables = self.trainable_variables
            self.optimizer.apply(tape.gradient(loss, variables), variables)
            return {"own_loss": loss}

elif ON_TORCH:
    import torch

    _as_array = torch.Tensor.__array__

    def _detached(self, *args, **kwargs):
        full = self.detach()
        full = full.float() if full.dtype == torch.bfloat16 else full
        return _as_array(full, *args, **kwargs)

    # Tests hand outputs to NumPy, which on PyTorch have a gradient, and may
    # have a dtype that NumPy has not.
    torch.Tensor.__array__ = _detached

    def _vjp(owner, function, inputs, dy, variables):
        inputs = [x.detach().requires_grad_() for x in inputs]
        values = [variable.value for variable in variables]
        with torch.enable_grad():
            y = function(*inputs)
        sources = [t for t in [*inputs, *values] if t.requires_grad]
        dy = torch.ones_like(y) if dy is None else ops.cast(dy, y.dtype)
        found = torch.autograd.grad(
            y, sources, dy, allow_unused=True, materialize_grads=True
        )
        of = dict(zip(map(id, sources), found))
        gradients = [
            of.get(id(t), torch.zeros_like(t)) for t in [*inputs, *values]
        ]
        return y, gradients[: len(inputs)], gradients[len(inputs) :]

    def compiled(
        function: Callable, variables: Sequence[keras.Variable]
    ) -> Callable:
        """A function of tensors as it is: PyTorch runs eagerly."""
        return function

    def synchronize(model: keras.Model) -> None:
        """Lets a callback see the variables after a batch."""

    class OwnStep:
        """A model's training step as a user writes it."""

        def train_step(self, data):
            x, y = data
            self.zero_grad()
            loss = self.compute_loss(y=y, y_pred=self(x))
            loss.backward()
            variables = self.trainable_variables
            with torch.no_grad():
                self.optimizer.apply(
                    [v.value.grad for v in variables], variables
                )
            return {"own_loss": loss}

else:
    import jax

    def _vjp(owner, function, inputs, dy, variables):
        state = [] if owner is None else owner.variables

        def pure(inputs, values):
            mapping = [*zip(state, before), *zip(variables, values)]
            with keras.StatelessScope(mapping) as scope:
                y = function(*inputs)
            return y, [scope.get_current_value(v) for v in state]

        before = [variable.value for variable in state]
        values = [variable.value for variable in variables]
        y, pull, after = jax.vjp(pure, inputs, values, has_aux=True)
        for variable, value in zip(state, after):
            if all(variable is not one for one in variables):
                variable.assign(value)
        dy = ops.ones_like(y) if dy is None else ops.cast(dy, y.dtype)
        return y, *pull(dy)

    def compiled(
        function: Callable, variables: Sequence[keras.Variable]
    ) -> Callable:
        """A function of tensors, compiled at its first call.

        Args:
            function: It may read and assign Keras variables.
            variables: All variables that it reads.
        """
        variables = list(variables)

        @jax.jit
        def pure(values, *arguments):
            with keras.StatelessScope(list(zip(variables, values))) as scope:
                result = function(*arguments)
            return result, [scope.get_current_value(v) for v in variables]

        def run(*arguments):
            before = [variable.value for variable in variables]
            result, after = pure(before, *arguments)
            for variable, value in zip(variables, after):
                variable.assign(value)
            return result

        return run

    def synchronize(model: keras.Model) -> None:
        """Lets a callback see the variables after a batch."""
        model.jax_state_sync()

    class OwnStep:
        """A model's training step as a user writes it."""

        def train_step(self, state, data):
            trainable, others, of_optimizer, metrics = state
            x, y = data

            def loss_of(trainable):
                y_pred, updated = self.stateless_call(trainable, others, x)
                return self.compute_loss(y=y, y_pred=y_pred), updated

            (loss, others), gradients = jax.value_and_grad(
                loss_of, has_aux=True
            )(trainable)
            trainable, of_optimizer = self.optimizer.stateless_apply(
                of_optimizer, gradients, trainable
            )
            return {"own_loss": loss}, (
                trainable,
                others,
                of_optimizer,
                metrics,
            )
