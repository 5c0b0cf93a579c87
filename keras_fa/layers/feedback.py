"""What makes a stock Keras layer an FA layer.

Data flow of one call, for a layer with one kernel:

```
kernel W ------------------------------+
   |                                   v
   +--> rule(stored B, W) = B --> feedback_op(x, W, B, bias) --> activation
                                   y  = op(x, W) + bias
                                   dx = op^T(dy, B)
                                   dW, dbias of op(x, W) + bias
```

`op` is the stock layer's own `call`, run with other tensors in the place of
its weights and with a linear activation, so that all that a stock layer can do
(strides, groups, causal padding, ...) is kept, and a layer kind is a class
statement.
"""

import contextlib
import copy
import inspect
import re
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import ClassVar
from typing import NoReturn

import keras
import numpy as np
from keras import ops

from keras_fa import constraints
from keras_fa import gradients
from keras_fa import initializers
from keras_fa import regularizers

_FEEDBACK_ARGUMENTS = (
    "feedback_initializer",
    "feedback_regularizer",
    "feedback_constraint",
)
_REFUSED_ARGUMENTS = ("lora_rank", "lora_alpha", "quantization_config")


class FeedbackPath(keras.layers.Layer):
    """The way down for the error of one kernel, part of an FA layer.

    It holds the stored feedback kernel, the rule that makes B of it, and the
    kernel's own constraint, and saves what these remember.

    Attributes:
        kernel: The forward kernel, a variable of the FA layer.
        feedback_kernel: The stored weight; `None` where nothing is stored. A
            scalar where the magnitude is one for the whole kernel.
        rule: The `FeedbackConstraint` of this path, or `None` for FA.
    """

    def __init__(
        self,
        kernel: keras.Variable,
        rule: constraints.FeedbackConstraint | None,
        units: np.ndarray,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # A function, since an attribute would be tracked as a second owner.
        self._forward = lambda: kernel
        self.rule = rule
        self.feedback_kernel = None
        self._follows_norm = False
        self._constraint = kernel.constraint
        if isinstance(self._constraint, constraints.KernelConstraint):
            self._constraint.build(kernel, units)
        if rule is not None:
            rule.build()
            # Random state belongs to the layer, for Keras to carry along.
            self._seed_generator = getattr(rule, "seed_generator", None)
        # Not Keras weights, yet the exported graph refers to them.
        self._exported = gradients.exported(list(self.memory.values()))
        self.built = True

    @property
    def kernel(self) -> keras.Variable:
        return self._forward()

    def store(
        self, initializer: Any, kernel_initializer: Any, regularizer: Any
    ) -> None:
        """Adds the stored feedback kernel.

        Args:
            initializer: The layer's `feedback_initializer`.
            kernel_initializer: The one that the kernel was drawn from.
            regularizer: A stock regularizer of the stored kernel, or `None`.
        """
        shape = self.kernel.shape
        if initializers.is_constant(initializer):
            shape = ()
            self._follows_norm = isinstance(
                initializer, initializers.KernelMagnitude
            )
        if self._follows_norm:

            def draw(shape, dtype=None):
                return self._matched_magnitude()
        else:
            draw = initializers.independent(
                initializer, kernel_initializer, self.kernel.path
            )
        self.feedback_kernel = self.add_weight(
            shape=shape,
            initializer=draw,
            regularizer=regularizer,
            dtype=self.kernel.dtype,
            trainable=False,
            autocast=False,
            # Replicas hold the same kernel, so any one may assign it.
            aggregation="only_first_replica",
            name=f"feedback_{self.kernel.name}",
        )

    @property
    def tied(self) -> bool:
        """Whether the error takes the forward kernel itself."""
        return isinstance(self.rule, constraints.TiedKernel)

    @property
    def excitatory(self) -> Any:
        """Which fixed signs are positive, a boolean variable, or `None`."""
        return self.memory.get("excitatory")

    def effective(self, kernel: Any) -> Any:
        """B for a forward kernel W: what carries the error.

        Args:
            kernel: The tensor W.

        Returns:
            A tensor with the shape and dtype of `kernel`.
        """
        feedback = self._apply_rule(self._stored(), self._full(kernel))
        return ops.stop_gradient(ops.cast(feedback, kernel.dtype))

    @property
    def _full_dtype(self) -> str:
        """The precision that rules work in: half is too little for norms."""
        return keras.backend.result_type(self.variable_dtype, "float32")

    def _full(self, tensor: Any) -> Any:
        return ops.cast(tensor, self._full_dtype)

    def _stored(self) -> Any:
        if self.feedback_kernel is None:
            return None
        return self._full(self.feedback_kernel)

    def _apply_rule(self, feedback_kernel: Any, kernel: Any) -> Any:
        feedback = feedback_kernel
        if self.rule is not None:
            feedback = self.rule(feedback_kernel, self.signed(kernel))
        if tuple(feedback.shape) not in ((), tuple(kernel.shape)):
            raise ValueError(
                f"{type(self.rule).__name__} must return a kernel of the shape "
                f"{tuple(kernel.shape)}. Received: {tuple(feedback.shape)}"
            )
        return ops.broadcast_to(feedback, kernel.shape)

    def signed(self, kernel: Any) -> Any:
        """W as rules see it: under fixed signs, zeros have theirs."""
        if self.excitatory is None:
            return kernel
        excitatory = gradients.recall(self.excitatory, kernel)
        least = float(np.finfo("float32").tiny)
        size = ops.maximum(ops.abs(kernel), least)
        return ops.where(excitatory, size, -size)

    def matched_feedback_kernel(self) -> Any:
        """The stored feedback kernel, scaled so that `||B|| = ||W||`."""
        if self.feedback_kernel.shape == ():
            return self._matched_magnitude()
        stored = self._stored()
        ratio = self._norm_ratio(stored)
        # A kernel that is zero for now must not wipe out what is stored.
        ratio = ops.where(ratio > 0, ratio, ops.ones_like(ratio))
        return ops.cast(stored * ratio, self.variable_dtype)

    def _matched_magnitude(self) -> Any:
        """`||W|| / ||rule(1, W)||`, of the kernel alone: it starts from it."""
        ratio = self._norm_ratio(ops.ones((), dtype=self._full_dtype))
        return ops.cast(ratio, self.variable_dtype)

    def _norm_ratio(self, stored: Any) -> Any:
        """`||W|| / ||B||` with the B that comes of a stored kernel."""
        kernel = self._full(self.kernel)
        return ops.divide_no_nan(
            constraints.kernel_norm(kernel),
            constraints.kernel_norm(self._apply_rule(stored, kernel)),
        )

    def refresh(self) -> None:
        """Takes signs, norms and the matched magnitude anew from the kernel."""
        if isinstance(self._constraint, constraints.KernelConstraint):
            self._constraint.refresh(self.kernel)
        if self._follows_norm:
            self.feedback_kernel.assign(self.matched_feedback_kernel())

    def quantize(self, mode: str | None = None, *args: Any, **kwargs: Any):
        """Not supported; raises a `ValueError`. `Model.quantize` comes here."""
        _refuse(self.kernel.path, f"quantize(mode={mode!r})")

    @property
    def memory(self) -> dict[str, keras.Variable]:
        """What the kernel's constraint remembers, by name.

        These variables are not among a model's own: an optimizer that calls
        the constraint has to find them where it finds no other state.
        """
        if isinstance(self._constraint, constraints.KernelConstraint):
            return self._constraint.state
        return {}

    def _state(self) -> dict[str, keras.Variable]:
        if self.feedback_kernel is None:
            return self.memory
        return {**self.memory, "feedback_kernel": self.feedback_kernel}

    def save_own_variables(self, store: Any) -> None:
        for name, variable in self._state().items():
            store[name] = variable

    def load_own_variables(self, store: Any) -> None:
        saved = {name: store[name] for name in list(store.keys())}
        if not saved and not _is_of_fa_layer(store):
            self.refresh()  # a file of stock layers: only the kernel came
            return
        state = self._state()
        given = {name: np.shape(value) for name, value in saved.items()}
        wanted = {name: tuple(value.shape) for name, value in state.items()}
        if given != wanted:
            raise ValueError(
                "The weights file was written under another method. The "
                f"feedback path of '{self.kernel.path}' holds {wanted}. "
                f"Received: {given}. Load the file into a model of the method "
                "that it was saved from."
            )
        for name, variable in state.items():
            gradients.remember(variable, saved[name])


class FeedbackLayer:
    """Mixin: a Keras layer whose errors go down through feedback kernels.

    Args:
        *args: As for the stock layer.
        feedback_initializer: How the stored feedback kernel starts. `None`
            (default): drawn from the kernel's law, independently of the
            kernel. `"constant"`: one magnitude that gives B_0 the norm of W_0.
            Else a Keras initializer; a constant one is stored as a scalar.
        feedback_regularizer: `None` (default), a `FeedbackRegularizer` such as
            `"alignment"`, or a stock regularizer, which (as with any Keras
            weight) acts only where the feedback kernel is trainable.
        feedback_constraint: The rule that gives B. `None` (default) is the
            stored kernel itself: FA. Else a `FeedbackConstraint`, its name
            (`"sign_concordance"`, `"tied_kernel"`, `"noisy_kernel"`), or a
            stock constraint, which is applied to the stored kernel.
        **kwargs: As for the stock layer. Kernel constraints may be names of
            `keras_fa.constraints` or a list of constraints.

    Raises:
        ValueError: For LoRA and for quantization, which replace the kernel
            that a feedback path belongs to.
    """

    kernel_names: ClassVar[tuple[str, ...]] = ("kernel",)
    kernel_constraint_arguments: ClassVar[tuple[str, ...]] = (
        "kernel_constraint",
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if issubclass(cls, keras.layers.Layer):
            # A subclass with an __init__ of its own has that one's.
            ours = cls.__init__ is FeedbackLayer.__init__
            cls.__signature__ = _signature(cls) if ours else None

    def __init__(
        self,
        *args: Any,
        feedback_initializer: Any = None,
        feedback_regularizer: Any = None,
        feedback_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        for name in _REFUSED_ARGUMENTS:
            if kwargs.get(name) is not None:
                _refuse(type(self).__name__, f"{name}={kwargs[name]}")
        for name in self.kernel_constraint_arguments:
            if name in kwargs:
                kwargs[name] = constraints.get_kernel_constraint(kwargs[name])
        super().__init__(*args, **kwargs)
        if getattr(self, "quantization_mode", None) is not None:
            _refuse(type(self).__name__, f"dtype={self.dtype_policy.name}")
        self.feedback_initializer = initializers.get(feedback_initializer)
        self.feedback_regularizer = regularizers.get(feedback_regularizer)
        self.feedback_constraint = constraints.get(feedback_constraint)
        self._drawn_from = {}

    def enable_lora(self, rank: int, *args: Any, **kwargs: Any) -> None:
        """Not supported; raises a `ValueError`."""
        _refuse(type(self).__name__, f"enable_lora(rank={rank})")

    def quantize(self, mode: str | None = None, *args: Any, **kwargs: Any):
        """Not supported; raises a `ValueError`."""
        _refuse(type(self).__name__, f"quantize(mode={mode!r})")

    def add_weight(self, *args: Any, name: Any = None, **kwargs: Any) -> Any:
        """As `keras.layers.Layer.add_weight`.

        Gives each kernel its own copy of its constraint, and remembers what
        the kernel was drawn from.
        """
        if name in self.kernel_names:
            constraint = copy.copy(kwargs.get("constraint"))
            given = kwargs.get("initializer")
            initializer = keras.initializers.get(
                "glorot_uniform" if given is None else given
            )
            self._drawn_from[name] = initializer
            if hasattr(constraint, "initial_kernel"):
                initializer = self._constrained(name, initializer, constraint)
            kwargs.update(constraint=constraint, initializer=initializer)
        return super().add_weight(*args, name=name, **kwargs)

    def _constrained(
        self, name: str, initializer: Any, constraint: Any
    ) -> Callable:
        def draw(shape, dtype=None):
            units = self.presynaptic_units(name, shape)
            return constraint.initial_kernel(initializer(shape, dtype), units)

        return draw

    def build(self, input_shape: Any) -> None:
        """As the stock layer's `build`, then adds the feedback weights."""
        super().build(input_shape)
        self.feedback_paths = [
            self._build_path(name) for name in self.kernel_names
        ]

    def _build_path(self, name: str) -> FeedbackPath:
        kernel = getattr(self, name)
        path = FeedbackPath(
            kernel,
            rule=copy.copy(self.feedback_constraint),
            units=self.presynaptic_units(name, kernel.shape),
            dtype=self.dtype_policy,
            name="feedback",
        )
        pairwise = isinstance(
            self.feedback_regularizer, regularizers.FeedbackRegularizer
        )
        if path.rule is None or path.rule.stores_feedback_kernel or pairwise:
            path.store(
                self.feedback_initializer,
                self._drawn_from[name],
                None if pairwise else self.feedback_regularizer,
            )
        if pairwise:
            kernel.regularizer = _with_feedback(
                kernel.regularizer, self.feedback_regularizer, path
            )
        return path

    def presynaptic_units(self, name: str, shape: tuple) -> np.ndarray:
        """The index of the presynaptic unit of each weight of a kernel.

        Args:
            name: The kernel's name.
            shape: The kernel's shape.

        Returns:
            An integer array that broadcasts to `shape`.
        """
        return constraints.units_along(shape, -2)

    def call(self, inputs: Any) -> Any:
        """As the stock layer's `call`; errors go through the feedback."""
        exact = gradients.in_backpropagation() or all(
            path.tied for path in self.feedback_paths
        )
        if exact:
            return super().call(inputs)
        if gradients.is_sparse(inputs):
            raise ValueError(
                "FA layers take dense inputs: an error has no sparse form. "
                f"Received: a {type(inputs).__name__} of shape {inputs.shape}. "
                "Make it dense first, or use `keras.Input(sparse=False)`."
            )
        # Read once: B is made of the very W that the output is computed with.
        kernels = [ops.copy(path.kernel) for path in self.feedback_paths]
        feedback = [
            path.effective(kernel)
            for path, kernel in zip(self.feedback_paths, kernels)
        ]
        biases = [] if self.bias is None else [self.bias]
        outputs = gradients.feedback_op(
            self._linear_op,
            inputs,
            kernels,
            feedback,
            [ops.convert_to_tensor(bias) for bias in biases],
        )
        if self.activation is not None:
            outputs = self.activation(outputs)
        return outputs

    def _linear_op(self, inputs: Any, kernels: list, biases: list) -> Any:
        """The stock layer's `call` without its activation, on tensors."""
        variables = [path.kernel for path in self.feedback_paths]
        if biases:
            variables.append(self.bias)
        scope = keras.StatelessScope(
            list(zip(variables, [*kernels, *biases])),
            initialize_variables=False,
        )
        with scope, self._linear():
            return super().call(inputs)

    @contextlib.contextmanager
    def _linear(self) -> Iterator[None]:
        activation = self.activation
        self.activation = None
        try:
            yield
        finally:
            self.activation = activation

    @property
    def feedback_kernel(self) -> Any:
        """The stored feedback kernel, or `None` where nothing is stored.

        A non-trainable variable of the kernel's shape, or a scalar where the
        feedback has one magnitude. A tuple, in the order of the kernels, for
        layers with two (depthwise and pointwise).
        """
        return self._one_or_all(path.feedback_kernel for path in self._paths())

    def effective_feedback_kernel(self) -> Any:
        """B, the kernel that carries the error now.

        Returns:
            A tensor of the kernel's shape, in its variable dtype; a tuple of
            them for layers with two kernels. Reading it advances no random
            state: under `NoisyKernel` it is what the next step will use.
        """
        with gradients.isolated(self.variables):
            return self._one_or_all(
                path.effective(ops.convert_to_tensor(path.kernel))
                for path in self._paths()
            )

    def refresh(self) -> None:
        """Takes what this layer remembers of its kernels anew from them.

        The fixed signs of E/I, the norm of Const. and a matched constant
        magnitude. Call it after a bare `set_weights` with weights of another
        model; loading a weights file does it by itself.
        """
        for path in self._paths():
            path.refresh()

    def _paths(self) -> list[FeedbackPath]:
        if not self.built:
            raise AttributeError(
                f"{type(self).__name__} '{self.name}' has no feedback kernel "
                "yet. Build the layer first, by calling it or with "
                "`layer.build(input_shape)`."
            )
        return self.feedback_paths

    @staticmethod
    def _one_or_all(values: Iterator) -> Any:
        values = tuple(values)
        return values[0] if len(values) == 1 else values

    def load_own_variables(self, store: Any) -> None:
        """As the stock layer's; files of stock layers load too."""
        super().load_own_variables(_own_or_stock_entry(store))

    def get_config(self) -> dict:
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            **{
                name: serialize(getattr(self, name))
                for name in _FEEDBACK_ARGUMENTS
            },
        }


def _refuse(owner: str, given: str) -> NoReturn:
    raise ValueError(
        f"{owner} supports neither LoRA nor quantization, which replace the "
        "kernel that its feedback path belongs to. Train first, then use "
        "`keras_fa.to_backprop(model)` and go on with the plain Keras model. "
        f"Received: {given}"
    )


def _own_or_stock_entry(store: Any) -> Any:
    """Where a weights file keeps a layer: under our class's name or stock's.

    Keras names the entries of a file after the layers' classes, so the stock
    twin of `layers/fa_dense_1` is `layers/dense_1`.
    """
    path = getattr(store, "_h5_entry_path", None)
    if path is None or list(store.keys()):
        return store
    return store.get(re.sub(r"(^|/)fa_([^/]*)$", r"\1\2", path))


def _is_of_fa_layer(store: Any) -> bool:
    """Whether the entry of a feedback path is below that of an FA class."""
    path = getattr(store, "_h5_entry_path", None) or ""
    layer = path.rpartition("/feedback_paths/")[0]
    ours = layer.rpartition("/")[2].startswith("fa_")
    return ours and layer in store.h5_file


def _with_feedback(
    regularizer: Any, feedback_regularizer: Any, path: FeedbackPath
) -> Callable[[Any], Any]:
    """A kernel's own penalty plus that on it and its feedback kernel."""

    def penalty(kernel):
        total = feedback_regularizer(path.feedback_kernel, kernel)
        return total if regularizer is None else total + regularizer(kernel)

    return penalty


def _signature(cls: type) -> inspect.Signature:
    """The stock layer's arguments with the feedback family added."""
    stock = next(
        base
        for base in cls.__mro__
        if issubclass(base, keras.layers.Layer)
        and not issubclass(base, FeedbackLayer)
    )
    parameters = [
        parameter
        for name, parameter in inspect.signature(stock).parameters.items()
        if name not in _REFUSED_ARGUMENTS
    ]
    keyword = inspect.Parameter.KEYWORD_ONLY
    feedback = [
        inspect.Parameter(name, keyword, default=None)
        for name in _FEEDBACK_ARGUMENTS
    ]
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        parameters[-1:] = [*feedback, parameters[-1]]
    else:
        parameters.extend(feedback)
    return inspect.Signature(parameters)


def feedback_layers(layer: keras.layers.Layer) -> list[FeedbackLayer]:
    """All FA layers in a layer or model, however deep, each once."""
    return [
        inner for inner in all_layers(layer) if isinstance(inner, FeedbackLayer)
    ]


def all_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """A layer and all layers in it, however deep, each once."""
    return list(layer._flatten_layers())


def all_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """All that a layer or model reads in a step.

    Its own variables, and what the constraints of its kernels remember.
    """
    return [
        *layer.variables,
        *(
            variable
            for inner in feedback_layers(layer)
            if inner.built
            for path in inner.feedback_paths
            for variable in path.memory.values()
        ),
    ]
