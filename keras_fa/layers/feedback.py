"""What makes a stock Keras layer an FA layer.

Data flow of one call, for a layer with one kernel:

```
kernel W ---------------------> y  = op(x, W) + bias --> activation
   |                            dW, dbias of op(x, W) + bias
   +--> B = rule(stored B, W) -> dx = op^T(dy, B)
             ^
             +-- learns, if told so, of dW or of x, W and y
```

`op` is the stock layer's own `call`, run on a copy of the layer that has
tensors in the place of its weights and no activation, so that all that a stock
layer can do (strides, groups, causal padding, ...) is kept, and a layer kind
is a class statement.
"""

import copy
import inspect
import re
import warnings
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import ClassVar
from typing import NoReturn

import keras
import numpy as np
from keras import ops

from keras_fa import _gradients
from keras_fa import constraints
from keras_fa import initializers
from keras_fa import learning
from keras_fa import regularizers
from keras_fa._cloning import all_layers
from keras_fa._types import Draw
from keras_fa._types import Identifier
from keras_fa._types import Store
from keras_fa._types import Tensor

_FEEDBACK_ARGUMENTS = (
    "feedback_initializer",
    "feedback_regularizer",
    "feedback_constraint",
    "feedback_learning",
)
# What each of them resolves, by its last word.
_RESOLVED = {
    "initializer": lambda given: initializers.drawn_apart(
        initializers.get(given)
    ),
    "regularizer": regularizers.get,
    "constraint": lambda given: copy.copy(
        initializers.drawn_apart(constraints.get(given))
    ),
    "learning": learning.get,
}
_REFUSED_ARGUMENTS = ("lora_rank", "lora_alpha", "quantization_config")


class FeedbackPath:
    """The way down for the error of one kernel, part of an FA layer.

    Its variables are weights of the layer, so that whatever Keras does with a
    layer's weights it does with them.

    Args:
        layer: The FA layer, whose kernels are built.
        name: The kernel's name.

    Attributes:
        kernel: The forward kernel.
        feedback_kernel: The stored weight; `None` where nothing is stored.
        initializer: What it starts from, as the layer's argument.
        stored: That one, if there is one, and the rule's variables, by name.
        rule: The rule.
        learning: What moves the stored weight; `None` where nothing does.
        fixed: What the kernel's constraint remembers of it.
        mixes: Whether each input meets all outputs.
        in_loop: As of the layer.
        attributes: What the layer is to have as attributes, by name: the
            stored feedback kernel, what the rule keeps, and what the kernel's
            constraint remembers where that is a weight.
    """

    def __init__(self, layer: "FeedbackLayer", name: str) -> None:
        self.kernel = kernel = getattr(layer, name)
        given = layer.given(name, "constraint")
        self.rule = (
            constraints.Stored(None) if given is None else copy.copy(given)
        )
        self.learning = layer.given(name, "learning")
        learns = self.learns
        self.fixed = constraints.Chain(constraints.parts_of(kernel.constraint))
        self.in_loop = layer.in_loop
        self.mixes = name not in layer.depthwise_kernels
        law = self.initializer = layer.given(name, "initializer")
        self.rule.initializer = layer._drawn_from[name] if law is None else law
        self.feedback_kernel = None
        self.attributes = {}
        regularizer = layer.given(name, "regularizer")
        pairwise = isinstance(regularizer, regularizers.FeedbackRegularizer)
        if self.rule.stores_feedback_kernel or pairwise:
            distribution = keras.distribution.distribution()
            self.feedback_kernel = keras.Variable(
                shape=kernel.shape,
                initializer=self._draw(layer, name),
                dtype=kernel.dtype,
                trainable=learns,
                autocast=False,
                # Replicas hold the same values, so any one may assign them.
                aggregation=kernel.aggregation
                if learns
                else "only_first_replica",
                name=f"{kernel.name}_feedback",
                # Sharded as its kernel is; layout maps go by the path.
                layout=distribution
                and distribution.get_variable_layout(kernel),
            )
            self.attributes["feedback_kernel"] = self.feedback_kernel
            if learns and not pairwise:
                given = regularizer
                if given is None and self.learning.decays_as_kernel:
                    given = kernel.regularizer
                self.feedback_kernel.regularizer = given
        if pairwise:
            own, of_pair = kernel.regularizer, regularizer

            def penalty(kernel: Tensor) -> Tensor:
                target = ops.stop_gradient(self.feedback_kernel)
                total = of_pair(target, kernel)
                return total if own is None else total + own(kernel)

            kernel.regularizer = penalty

        made = []

        def add_weight(
            trainable: bool = False, **kwargs: object
        ) -> keras.Variable:
            trainable = trainable and learns
            if not trainable:
                kwargs = {"aggregation": "only_first_replica", **kwargs}
            made.append(layer.add_weight(trainable=trainable, **kwargs))
            return made[-1]

        self.rule.build(kernel, add_weight)
        self.attributes |= _kept_by(self.rule, made)
        self.stored = {
            key: value
            for key, value in self.attributes.items()
            if isinstance(value, keras.Variable)
        }
        if self.learning is not None:
            self._check_learning(made)
        units = layer.presynaptic_units(name, kernel.shape)
        if _gradients.backend.TRACKS_CONSTRAINTS:
            self.fixed.build(kernel, units, add_weight)
            self.attributes |= self.fixed.state
        else:
            self.fixed.build(kernel, units)

    def _check_learning(self, made: list[keras.Variable]) -> None:
        """Refuses learning that moves nothing, warns of what aligns nothing.

        Args:
            made: The weights that the rule added.
        """
        stored, learning = self.feedback_kernel, self.learning
        own = learning.in_step and any(weight.trainable for weight in made)
        if not self.rule.stores_feedback_kernel and not own:
            raise ValueError(
                f"{type(learning).__name__} moves a stored feedback kernel, "
                f"and {type(self.rule).__name__} of '{self.kernel.path}' has "
                "none. Leave `feedback_learning` out, or use a "
                "`feedback_constraint` that stores one, such as None."
            )
        decays = stored is not None and stored.regularizer is not None
        if learning.decays_as_kernel and not decays:
            # A kernel's regularizer is not that of a rule's own weights.
            or_else = ", or the layers a kernel_regularizer"
            warnings.warn(
                f"{type(learning).__name__} aligns B with W only where both "
                "decay. Give the optimizer a weight_decay"
                f"{'' if stored is None else or_else}; else W - B stays as it "
                "is.",
                stacklevel=5,
            )

    def _draw(self, layer: "FeedbackLayer", name: str) -> Draw:
        """What the stored feedback kernel starts from."""
        given, kernel, rule = self.initializer, self.kernel, self.rule
        if not isinstance(given, initializers.KernelMagnitude):
            return initializers.independent(
                given, layer._drawn_from[name], kernel.path
            )

        def draw(shape: tuple, dtype: str | None = None) -> Tensor:
            signed = isinstance(given, initializers.KernelSign)
            unit = ops.sign(kernel) if signed else ops.ones(shape, dtype)
            norms = map(constraints.kernel_norm, (kernel, rule(unit, kernel)))
            return ops.divide_no_nan(*norms) * unit

        return draw

    @property
    def variables(self) -> dict[str, keras.Variable]:
        """All that this path keeps, by name, in one order."""
        kept = self.attributes | self.fixed.state
        return {k: getattr(v, "state", v) for k, v in kept.items()}

    @property
    def tied(self) -> bool:
        """Whether the error takes the forward kernel itself."""
        return isinstance(self.rule, constraints.TiedKernel)

    @property
    def learns(self) -> bool:
        """Whether B receives a gradient in each training step."""
        return self.learning is not None and self.learning.in_step

    @property
    def mirrored(self) -> bool:
        """Whether a `MirrorPhase` moves the stored feedback kernel."""
        return self.learning is not None and not self.learning.in_step

    @property
    def moves(self) -> bool:
        """Whether training is to move the stored feedback kernel."""
        if self.feedback_kernel is None:
            return False
        return self.feedback_kernel.trainable or self.mirrored

    @property
    def full_dtype(self) -> str:
        """The dtype of rules: half precision is too little for norms."""
        return keras.backend.result_type(self.kernel.dtype, "float32")

    def effective(self, kernel: Tensor) -> Tensor:
        """B for a forward kernel W: what carries the error.

        Args:
            kernel: The tensor W.

        Returns:
            A tensor with the shape and dtype of `kernel`.
        """
        full, stored = self.full_dtype, self.feedback_kernel
        stored = None if stored is None else ops.cast(stored, full)
        seen = self.fixed.signed(ops.cast(kernel, full))
        feedback = self.rule(stored, seen)
        if tuple(feedback.shape) != tuple(kernel.shape):
            raise ValueError(
                f"{type(self.rule).__name__} must return a kernel of the shape "
                f"{tuple(kernel.shape)}. Received: {tuple(feedback.shape)}"
            )
        return ops.cast(feedback, kernel.dtype)

    def current(self) -> Tensor:
        """B now. Reading it advances no random state."""
        kernel = ops.convert_to_tensor(self.kernel)  # of the scope around
        with _gradients.isolated(self.variables.values()):
            return ops.stop_gradient(self.effective(kernel))

    def warn_if_equal(self) -> None:
        """Warns where one error goes to all inputs, up to its sign."""
        units = any(
            isinstance(part, constraints.FixedSign) and part.per == "unit"
            for part in self.fixed.constraints
        )
        strict = isinstance(self.rule, constraints.SignConcordance) and (
            self.rule.strict
        )
        if units and strict and self.mixes:
            warnings.warn(
                f"'{self.kernel.path}' has FixedSign(per='unit') and feedback "
                "of one magnitude: all of its inputs (of a window, in a "
                "convolution) receive the sum of the errors above, up to their "
                "sign. Below a softmax it is 0, and nothing learns. Use a rule "
                "with magnitudes that differ, "
                "feedback_constraint='sign_concordance', and keep the readout "
                "free.",
                stacklevel=5,
            )

    def warn_if_stale(self) -> None:
        """Warns where a step's constants are those of another kernel."""
        if not _gradients.backend.holds(self.kernel, self.fixed.holds):
            warnings.warn(
                f"The weights of '{self.kernel.path}' do not have the signs or "
                "the norm that were fixed for them: they came from elsewhere, "
                "in a way that Keras does not tell a layer of. The next update "
                "changes them to what was fixed. Call "
                "`keras_fa.refresh(model)` after setting weights.",
                stacklevel=4,
            )


class FeedbackArguments:
    """Mixin: a Keras layer that takes the `feedback_*` arguments.

    Attributes:
        stock_class: The stock layer's class.
        kernel_constraint_arguments: Its arguments that constrain kernels.
        prefixes: Of a kernel's name, where the kernel has feedback arguments
            of its own, what these begin with (`recurrent_feedback_*`).
    """

    stock_class: ClassVar[type] = object
    kernel_constraint_arguments: ClassVar[tuple[str, ...]] = (
        "kernel_constraint",
    )
    prefixes: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        bases = (b for b in cls.__mro__ if not issubclass(b, FeedbackArguments))
        cls.stock_class = next(bases)
        if issubclass(cls, keras.layers.Layer):
            # A subclass with an __init__ of its own has that one's.
            owner = next(b for b in cls.__mro__ if "__init__" in vars(b))
            ours = not issubclass(owner, keras.layers.Layer)
            added = cls.feedback_arguments()
            cls.__signature__ = _OfClass(
                _signature(cls.stock_class, added) if ours else None
            )

    @classmethod
    def feedback_arguments(cls) -> list[str]:
        """The names of the feedback arguments."""
        return [
            f"{prefix}{name}"
            for prefix in ("", *dict.fromkeys(cls.prefixes.values()))
            for name in _FEEDBACK_ARGUMENTS
        ]

    def _split(
        self, stock: Callable, args: tuple, kwargs: dict[str, object]
    ) -> tuple[inspect.BoundArguments, dict[str, object]]:
        """A constructor's arguments: the stock layer's, and the feedback ones.

        Kernel constraints among the stock layer's are resolved.
        """
        family = {n: kwargs.pop(n, None) for n in self.feedback_arguments()}
        given = inspect.signature(stock).bind(*args, **kwargs)
        for name in self.kernel_constraint_arguments:
            if name in given.arguments:
                given.arguments[name] = _own_constraint(given.arguments[name])
        return given, family

    def _keep(self, family: dict[str, object]) -> None:
        """Resolves feedback arguments, and has them as attributes."""
        for name, value in family.items():
            setattr(self, name, _RESOLVED[name.split("_")[-1]](value))

    def given(self, kernel: str, argument: str) -> object:
        """The feedback argument of a kernel, such as its "constraint".

        Of what several kernels share, each but the first has its own seed.
        """
        prefix = self.prefixes.get(kernel, "")
        value = getattr(self, f"{prefix}feedback_{argument}")
        alike = [
            name
            for name in self.kernel_names
            if self.prefixes.get(name, "") == prefix
        ]
        place = alike.index(kernel)
        return initializers.reseeded(value, place) if place else value

    def get_config(self) -> dict:
        serialize = keras.saving.serialize_keras_object
        family = {
            name: serialize(getattr(self, name))
            for name in self.feedback_arguments()
        }
        return super().get_config() | family


class FeedbackLayer(FeedbackArguments):
    """Mixin: a Keras layer whose errors go down through feedback kernels.

    Args:
        *args: As for the stock layer.
        feedback_initializer: How the stored feedback kernel starts. `None`
            (default): drawn from the kernel's law, independently of the
            kernel. `"constant"`: one magnitude that gives B_0 the norm of W_0.
            `"kernel_sign"`: the same with the signs of W_0. Else a Keras
            initializer. An instance that several layers are given draws other
            values for each.
        feedback_regularizer: `None` (default) or a `FeedbackRegularizer` such
            as `"alignment"`, a penalty on the pair of feedback and forward
            kernel. A stock regularizer is that of a stored kernel that learns,
            and else moves nothing.
        feedback_learning: What moves the stored feedback kernel, which is then
            trained: a `keras_fa.learning.FeedbackLearning` or its name, such as
            `"kolen_pollack"`. `None` (default): it stays as it was drawn.
        feedback_constraint: The rule that gives B. `None` (default) is the
            stored kernel itself: FA. Else a `FeedbackConstraint`, its name
            (`"sign_concordance"`, `"random_magnitude"`, `"tied_kernel"`,
            `"noisy_kernel"`), or a stock constraint, which is applied to the
            stored kernel.
        **kwargs: As for the stock layer. Kernel constraints may be names of
            `keras_fa.constraints` or a list of constraints.

    Attributes:
        kernel_names: The names of the kernels, as x meets them.
        in_loop: Whether it is called in a loop over time, which no tensor of a
            step can be taken out of.
        built_shape: The input shape that the layer was built for.
        stock_peers: The names of the layers of the stock layer's class, in the
            order of the stock model, where `convert` made this layer. A stock
            weights file with just these layers of this class is loaded. Else
            one in which layers of the class have equal shapes is refused: in a
            model that mixes stock and FA layers Keras might take one's weights
            for another's. `keras_fa.load_stock_weights` loads any file.

    Raises:
        ValueError: For LoRA, which replaces the kernel that a feedback path
            belongs to, and for a quantized dtype policy.
    """

    kernel_names: ClassVar[tuple[str, ...]] = ("kernel",)
    depthwise_kernels: ClassVar[tuple[str, ...]] = ()
    in_loop: ClassVar[bool] = False
    stock_peers: tuple[str, ...] = ()

    def __init__(self, *args: object, **kwargs: object) -> None:
        given, family = self._split(super().__init__, args, kwargs)
        super().__init__(*given.args, **given.kwargs)
        for name in (*_REFUSED_ARGUMENTS, "quantization_mode"):
            value = getattr(self, name, None)
            if value is not None:
                _refuse(type(self).__name__, f"{name}={value}")
        self._keep(family)
        self._drawn_from = {}

    @property
    def dtype_policy(self) -> keras.DTypePolicy:
        """As the stock layer's. A quantized one raises a `ValueError`."""
        return super().dtype_policy

    @dtype_policy.setter
    def dtype_policy(self, value: Identifier | keras.DTypePolicy) -> None:
        policy = keras.dtype_policies.get(value)
        if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
            policy = policy[self.path]
        if policy.quantization_mode is not None:
            _refuse(type(self).__name__, f"dtype_policy={policy.name}")
        keras.layers.Layer.dtype_policy.fset(self, value)

    def enable_lora(self, rank: int, *args: object, **kwargs: object) -> None:
        """Not supported; raises a `ValueError`."""
        _refuse(type(self).__name__, f"enable_lora(rank={rank})")

    def quantize(
        self, mode: str | None = None, *args: object, **kwargs: object
    ) -> None:
        """Not supported; `Model.quantize` warns and leaves this layer as is."""
        raise NotImplementedError(_UNSUPPORTED.format(self.name, f"{mode=}"))

    def add_weight(
        self, *args: object, name: str | None = None, **kwargs: object
    ) -> keras.Variable:
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
            if isinstance(constraint, constraints.KernelConstraint):

                def draw(shape: tuple, dtype: str | None = None) -> Tensor:
                    units = self.presynaptic_units(name, shape)
                    drawn = initializer(shape, dtype)
                    return constraint.initial_kernel(drawn, units)

                kwargs["initializer"] = draw
            kwargs["constraint"] = constraint
        return super().add_weight(*args, name=name, **kwargs)

    def build(self, input_shape: tuple) -> None:
        """As the stock layer's `build`, then adds the feedback weights."""
        mode = getattr(self, "quantization_mode", None)
        if mode is not None:  # of a policy that goes by the layer's path
            _refuse(type(self).__name__, f"quantization_mode={mode}")
        super().build(input_shape)
        self.built_shape = tuple(input_shape)
        try:
            for name in self.kernel_names:
                path = FeedbackPath(self, name)
                setattr(self, f"_{name}_path", path)
                # Keras finds a variable as an attribute, and
                # tf.train.Checkpoint in no other way.
                for key, value in path.attributes.items():
                    setattr(self, f"_{name}_{key}", value)
                path.warn_if_equal()
        except Exception:
            self.built = False  # no half-built layer is left behind
            raise

    def presynaptic_units(self, name: str, shape: tuple) -> np.ndarray:
        """The index of the presynaptic unit of each weight of a kernel.

        Args:
            name: The kernel's name.
            shape: The kernel's shape.

        Returns:
            An integer array that broadcasts to `shape`.
        """
        return constraints.units_along(shape, -2)

    def call(
        self,
        inputs: Tensor,
        *args: object,
        training: bool | None = None,
        **kwargs: object,
    ) -> Tensor:
        """As the stock layer's `call`; errors go through the feedback."""
        paths = self.feedback_paths
        exact = _gradients.in_backpropagation() or all(p.tied for p in paths)
        if exact:
            return super().call(inputs, *args, **kwargs)
        sparse = _gradients.backend.without_error(inputs)
        if sparse is not None:  # there is nothing below to send an error to
            return super().call(sparse, *args, **kwargs)
        if args or kwargs:
            # What the stock call does not take is refused as it refuses it.
            inspect.signature(super().call).bind(inputs, *args, **kwargs)
        # Each read once: B is made of the very W that y is computed with.
        kernels = [ops.convert_to_tensor(path.kernel) for path in paths]
        biases = [] if self.bias is None else [ops.convert_to_tensor(self.bias)]
        rule, learned = self.feedback_learning, None
        learns = rule is not None and rule.in_step
        if learns:
            fixed = list(map(ops.stop_gradient, kernels))
            learned = _gradients.learning_weights(
                lambda: self._effective(fixed)
            )
            inputs, *kernels = (
                _gradients.backend.after(learned.used, tensor)
                for tensor in (inputs, *kernels)
            )
        outputs = _gradients.feedback_op(
            self._linear_op,
            self._effective,
            inputs,
            kernels,
            biases,
            rule.of_kernels if learns else None,
            learned,
        )
        if learns and rule.loss is not None and training:
            local = self.locals(inputs, kernels, learned.used)
            loss = sum(map(rule.loss, local))
            # It moves B, and is not part of the loss that is shown.
            self.add_loss(loss - ops.stop_gradient(loss))
        if self.activation is not None:
            outputs = self.activation(outputs)
        return outputs

    def _linear_op(self, x: Tensor, kernels: list, biases: list) -> Tensor:
        """The stock layer's `call` without its activation, on tensors."""
        weights = [*(path.kernel for path in self.feedback_paths), self.bias]
        tensors = dict(zip(map(id, weights), [*kernels, *biases]))
        linear = object.__new__(type(self))
        attributes = vars(self)
        vars(linear).update(attributes, activation=None)
        for name, value in attributes.items():
            if id(value) in tensors:
                vars(linear)[name] = tensors[id(value)]
        return super(FeedbackLayer, linear).call(x)

    def _effective(self, kernels: list[Tensor]) -> list[Tensor]:
        """The kernels B that carry the error, for the kernels W."""
        return [
            path.effective(kernel)
            for path, kernel in zip(self.feedback_paths, kernels)
        ]

    def locals(
        self, x: Tensor, kernels: list[Tensor], feedback: list[Tensor]
    ) -> Iterator[learning.Local]:
        """What the feedback of each kernel may learn from.

        Args:
            x: An input of the layer, in its compute dtype.
            kernels: The kernels W, in the compute dtype.
            feedback: The kernels B, likewise.
        """
        x, local = ops.stop_gradient(x), None
        for op, path, w, b in zip(
            self.stages(), self.feedback_paths, kernels, feedback
        ):
            x = x if local is None else local.y
            w = ops.cast(ops.stop_gradient(w), path.full_dtype)
            local = learning.Local(op, x, w, ops.cast(b, path.full_dtype))
            yield local

    def stages(self) -> list[learning.Stage]:
        """For each kernel its linear operation `op(x, K)`, without bias."""
        biases = [] if self.bias is None else [self.bias]
        none = [ops.zeros(bias.shape, self.compute_dtype) for bias in biases]
        return [lambda x, kernel: self._linear_op(x, [kernel], none)]

    @property
    def variables(self) -> list[keras.Variable]:
        """As the stock layer's, and a look at what is fixed of kernels."""
        # Whatever trains a layer has read its variables before.
        for path in self.feedback_paths if self.built else ():
            path.warn_if_stale()
        return super().variables

    @property
    def feedback_paths(self) -> list[FeedbackPath]:
        """The feedback path of each kernel, in the order of the kernels."""
        if not self.built:
            raise self._not_built()
        return [getattr(self, f"_{name}_path") for name in self.kernel_names]

    def _not_built(self) -> AttributeError:
        return AttributeError(
            f"{type(self).__name__} '{self.name}' has no feedback kernel "
            "yet. Build the layer first, by calling it or with "
            "`layer.build(input_shape)`."
        )

    if hasattr(keras.layers.Layer, "__getattr__"):
        # PyTorch's modules are asked once more where a property has raised.
        def __getattr__(self, name: str) -> object:
            if name in ("feedback_paths", "feedback_kernel") and not self.built:
                raise self._not_built()
            return super().__getattr__(name)

    @property
    def feedback_kernel(self) -> keras.Variable | tuple | None:
        """The stored feedback kernel, or `None` where nothing is stored.

        A non-trainable variable of the kernel's shape. A tuple, in the order
        of the kernels, for layers with two (depthwise and pointwise).
        """
        return _one_or_all(path.feedback_kernel for path in self.feedback_paths)

    def stored_feedback(self) -> dict[str, keras.Variable]:
        """What is stored of feedback, by the kernel's name and its own."""
        return {
            f"{name}_{key}": variable
            for name, path in zip(self.kernel_names, self.feedback_paths)
            for key, variable in path.stored.items()
        }

    def law_of(self, stored: str) -> object:
        """The argument that says what a weight of `stored_feedback` is."""
        names = [n for n in self.kernel_names if stored.startswith(f"{n}_")]
        return self.given(names[0], "initializer")

    def effective_feedback_kernel(self) -> Tensor | tuple:
        """B, the kernel that carries the error now.

        Returns:
            A tensor of the kernel's shape, in its variable dtype; a tuple of
            them for layers with two kernels. Reading it advances no random
            state: under `NoisyKernel` it is what the next step will use.
        """
        return _one_or_all(path.current() for path in self.feedback_paths)

    def refresh(self) -> None:
        """Takes what this layer remembers of its kernels anew from them.

        The fixed signs of E/I and the norm of Const. Call it after a bare
        `set_weights` with weights of another model; loading a weights file
        does it by itself.
        """
        for path in self.feedback_paths:
            path.fixed.refresh(path.kernel)

    def restart(self) -> None:
        """Takes a B_0 that follows from W_0 anew, where W_0 was replaced."""
        for name, path in zip(self.kernel_names, self.feedback_paths):
            stored = path.feedback_kernel
            if stored is not None and isinstance(
                path.initializer, initializers.KernelMagnitude
            ):
                stored.assign(
                    path._draw(self, name)(stored.shape, stored.dtype)
                )

    def save_own_variables(self, store: Store) -> None:
        """Saves what the stock layer does, and what the feedback adds."""
        for name, variable in (self._stock_state() | self._state()).items():
            store[name] = variable

    def load_own_variables(self, store: Store) -> None:
        """Loads what `save_own_variables` or a stock layer has saved.

        Raises:
            ValueError: If the file holds more or other weights than this
                layer, or comes from a stock model and it is not known which
                weights of it are this layer's.
        """
        if not self.built:
            super().load_own_variables(store)  # Keras says what is wrong
            return
        of_stock = not list(store.keys())
        if of_stock:
            store = self._stock_entry(store)
        stock, ours = self._stock_state(), self._state()
        wanted = stock.keys() | (set() if of_stock else ours.keys())
        prefixes = tuple(f"{name}_" for name in self.kernel_names)
        found = sorted(store.keys())
        given = {n for n in found if n.isdigit() or n.startswith(prefixes)}
        if given != wanted:
            raise ValueError(
                "The weights file was written under another method or by "
                f"another layer. Layer '{self.name}' ({type(self).__name__}) "
                f"holds {', '.join([*stock, *ours])}. Received: "
                f"{', '.join(found)}. Load the file into a model like the one "
                "that it was saved from, a stock model's by "
                "`keras_fa.load_stock_weights(model, filepath)`."
            )
        for name, variable in stock.items():
            variable.assign(store[name])
        self.refresh()  # a stock file lacks what follows from the kernel
        if of_stock:
            self.restart()
        for name in given - stock.keys():
            _gradients.backend.remember(ours[name], store[name])

    def _stock_state(self) -> dict[str, keras.Variable]:
        """What the stock layer saves, under the names that it saves it by."""
        own = {}
        super().save_own_variables(own)
        ours = {id(variable) for variable in self._state().values()}
        return {k: v for k, v in own.items() if id(v) not in ours}

    def _state(self) -> dict[str, keras.Variable]:
        """What the feedback adds to a layer, by name."""
        if not self.built:
            return {}
        return {
            f"{name}_{key}": variable
            for name, path in zip(self.kernel_names, self.feedback_paths)
            for key, variable in path.variables.items()
        }

    def _stock_entry(self, store: Store) -> Store:
        """Where a stock model's file has the layer of this name."""
        groups = {}

        def visit(path: str, group: Mapping) -> None:
            if path.endswith("/vars"):
                groups[path.removesuffix("/vars")] = group

        if hasattr(store, "h5_file"):
            store.h5_file.visititems(visit)
        names = {entry: g.attrs.get("name") for entry, g in groups.items()}
        found = [entry for entry, name in names.items() if name == self.name]
        if len(found) == 1:
            # Keras numbers the layers of a class: dense, dense_1, ...
            kind = re.sub(r"_\d+$", "", found[0])
            alike = [e for e in names if re.sub(r"_\d+$", "", e) == kind]
            alike.sort(key=lambda entry: (len(entry), entry))
            peers = tuple(names[entry] for entry in alike)
            shapes = {tuple(v.shape for v in groups[e].values()) for e in alike}
            distinct = len(shapes) == len(alike) and not self.stock_peers
            if distinct or peers == self.stock_peers:
                return store.get(found[0])
        raise ValueError(
            f"It is not known which weights of the file are those of layer "
            f"'{self.name}' ({type(self).__name__}). If it is a stock model's, "
            "load it with `keras_fa.load_stock_weights(model, filepath)`."
        )


_UNSUPPORTED = (
    "FA layers support neither LoRA nor quantization, which replace the kernel "
    "that a feedback path belongs to. Train first, then use "
    "`keras_fa.to_backprop(model)` and go on with the plain Keras model. "
    "Received, for {}: {}"
)


def _refuse(owner: str, given: str) -> NoReturn:
    raise ValueError(_UNSUPPORTED.format(owner, given))


def _kept_by(
    rule: constraints.FeedbackConstraint, made: list[keras.Variable]
) -> dict[str, keras.Variable | keras.random.SeedGenerator]:
    """What a rule keeps, by the names of its attributes.

    Args:
        rule: A rule that is built.
        made: The weights that it added.
    """
    kept = {
        name: value
        for name, value in vars(rule).items()
        if isinstance(value, keras.Variable | keras.random.SeedGenerator)
    }
    lost = {id(weight) for weight in made} - {id(v) for v in kept.values()}
    if lost or _TAKEN & kept.keys():
        raise ValueError(
            f"{type(rule).__name__}.build has to assign each weight that it "
            "adds to an attribute of its own, by a name that is not one of "
            f"{', '.join(sorted(_TAKEN))}: by that name it is saved. Received: "
            f"{len(made)} weights, and attributes {', '.join(kept) or 'none'}."
        )
    return kept


# Names of what a layer keeps for each kernel besides.
_TAKEN = {"feedback_kernel", "path", "excitatory", "norm"}


def _own_constraint(identifier: Identifier) -> Callable | None:
    """A layer's own kernel constraint: shared instances draw other units."""
    constraint = constraints.get_kernel_constraint(identifier)
    if isinstance(constraint, constraints.Chain):
        parts = map(initializers.drawn_apart, constraint.constraints)
        return constraints.Chain(list(parts))
    return initializers.drawn_apart(constraint)


def _one_or_all(values: Iterator) -> object:
    values = tuple(values)
    return values[0] if len(values) == 1 else values


class _OfClass:
    """What a class has as an attribute, and its instances do not.

    `tf.function(layer)` takes an instance's signature for that of a call.
    """

    def __init__(self, value: object) -> None:
        self.value = value

    def __get__(self, instance: object, owner: type) -> object:
        if instance is not None:
            raise AttributeError("an attribute of the class alone")
        return self.value


def _signature(stock: type, added: list[str]) -> inspect.Signature:
    """The stock layer's arguments with the feedback arguments added."""
    parameters = dict(inspect.signature(stock).parameters)
    for name in _REFUSED_ARGUMENTS:
        parameters.pop(name, None)
    feedback = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in added
    ]
    return inspect.Signature(
        sorted([*parameters.values(), *feedback], key=lambda p: p.kind)
    )


def feedback_layers(layer: keras.layers.Layer) -> list[FeedbackLayer]:
    """All FA layers in a layer or model, however deep, each once."""
    return [
        inner for inner in all_layers(layer) if isinstance(inner, FeedbackLayer)
    ]


def all_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """All that a layer or model reads in a step.

    Its own variables, and what the constraints of its kernels remember.
    """
    variables = {id(v): v for v in layer.variables}
    for inner in feedback_layers(layer):
        for path in inner.feedback_paths if inner.built else ():
            variables |= {id(v): v for v in path.variables.values()}
    return list(variables.values())
