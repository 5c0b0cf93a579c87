"""The rows of the paper's table and two controls of ours, as values.

`METHODS` maps the name of a row to a `Method`: how feedback starts, the rule
that makes B of it, what constrains the forward kernel, which callbacks it
brings, and how errors are wired. `keras_fa.convert` reads it.

Two are not in the paper. "bp_ei", backpropagation under the fixed signs of the
E/I rows, tells what the signs cost by themselves; "fa_usf_sn_ei", E/I with the
magnitudes of SN, what the random magnitudes do.

```python
from keras_fa.methods import METHODS

method = METHODS["fa_usf_sn"]
assert method.title == "FA-uSF SN"
assert [type(c).__name__ for c in method.callbacks()] == ["StrictNormalization"]
assert METHODS["fa"].callbacks() == []
```
"""

import dataclasses
from collections.abc import Callable

import keras

from keras_fa._types import Identifier
from keras_fa.callbacks import StrictNormalization
from keras_fa.constraints import Chain
from keras_fa.constraints import ConstantNorm
from keras_fa.constraints import FixedSign
from keras_fa.constraints import NoisyKernel
from keras_fa.constraints import SignConcordance
from keras_fa.constraints import TiedKernel
from keras_fa.regularizers import Alignment


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train: one row of the paper's table.

    Of one's own: by its arguments, or from a row of `METHODS`.

    ```python
    import dataclasses
    from keras_fa.methods import METHODS

    # DenseFA whose next layer's path is FA.
    method = dataclasses.replace(
        METHODS["dense_fa"],
        feedback_initializer=None,
        feedback_constraint=None,
    )
    ```

    Attributes:
        name: The name in `METHODS`.
        title: The row's title in the paper.
        definition: What it computes, in one line.
        standing: Where the definition comes from. Default "our reading".
        feedback_initializer: As the argument of FA layers.
        feedback_constraint: As the argument of FA layers.
        feedback_regularizer: As the argument of FA layers.
        kernel_constraint: Added to the layer's own kernel constraint.
        wiring: `"chain"`: errors go down layer by layer. `"direct"`: DFA.
            `"dense"`: DenseFA.
        map_initializer: The law of the fixed random maps of DFA and DenseFA,
            each drawn independently: a Keras initializer or its name. `None`
            is Glorot uniform. An instance without a seed draws anew in each
            conversion.
        callback_classes: What `callbacks()` makes. Nothing depends on it: SN
            is strict by its rule, and its callback is there for loops that
            were written with one.
    """

    name: str
    title: str
    definition: str
    standing: str = "our reading"
    feedback_initializer: Identifier = None
    feedback_constraint: Identifier = None
    feedback_regularizer: Identifier = None
    kernel_constraint: Identifier = None
    wiring: str = "chain"
    map_initializer: Identifier = None
    callback_classes: tuple[Callable[[], keras.callbacks.Callback], ...] = ()

    def callbacks(self) -> list[keras.callbacks.Callback]:
        """The callbacks that go with this method: a fresh list each time."""
        return [make() for make in self.callback_classes]


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="bp",
            title="BP",
            definition="B = W",
            standing="backpropagation",
            feedback_constraint=TiedKernel(),
        ),
        Method(
            name="bp_noise",
            title="BP + Noise",
            definition="B = W + tan(a) ||W|| n / ||n||, n fresh Gaussian noise "
            "orthogonal to W, a the angle that uSF SN would have",
            feedback_constraint=NoisyKernel(),
        ),
        Method(
            name="bp_alignment",
            title="BP + Alignment",
            definition="B = W, loss + rate (1 - cos(W, B_0)) for each kernel, "
            "B_0 fixed and random",
            feedback_constraint=TiedKernel(),
            feedback_regularizer=Alignment(),
        ),
        Method(
            name="fa",
            title="FA",
            definition="B = B_0, drawn independently of W_0 from its law",
            standing="Lillicrap et al. (2016)",
        ),
        Method(
            name="fa_usf_init_ei",
            title="FA-uSF Init. E/I",
            definition="B = |B_0| sign(W), each weight keeps the sign of W_0",
            standing="the paper's",
            feedback_constraint=SignConcordance(),
            kernel_constraint=FixedSign(),
        ),
        Method(
            name="fa_usf_init",
            title="FA-uSF Init.",
            definition="B = |B_0| sign(W)",
            standing="the paper's, as a published reproduction states it",
            feedback_constraint=SignConcordance(),
        ),
        Method(
            name="fa_usf_sn",
            title="FA-uSF SN",
            definition="B = ||W|| sign(W) / ||sign(W)||",
            standing="the paper's strict normalization, as a published "
            "reproduction states it",
            feedback_constraint=SignConcordance(strict=True),
            callback_classes=(StrictNormalization,),
        ),
        Method(
            name="dfa",
            title="DFA",
            definition="each hidden kernel layer receives B_l e, "
            "e = dLoss/dlogits, B_l fixed and random",
            standing="Nokland (2016)",
            feedback_constraint=TiedKernel(),
            wiring="direct",
            map_initializer="glorot_uniform",
        ),
        Method(
            name="dense_fa",
            title="DenseFA",
            definition="uSF SN from the next kernel layer, and M e_m from each "
            "kernel layer m further up, M fixed and random",
            feedback_constraint=SignConcordance(strict=True),
            wiring="dense",
            # The chained error follows the weights; those of the maps are
            # kept a good deal smaller, to add to it and not to drown it.
            map_initializer=keras.initializers.VarianceScaling(
                scale=0.01, mode="fan_avg", distribution="uniform"
            ),
            callback_classes=(StrictNormalization,),
        ),
        Method(
            name="bp_const",
            title="BP Const.",
            definition="B = W, ||W_t|| = ||W_0||",
            standing="the paper's, as BioTorch reads it",
            feedback_constraint=TiedKernel(),
            kernel_constraint=ConstantNorm(),
        ),
        Method(
            name="fa_usf_const",
            title="FA-uSF Const.",
            definition="B = ||W_0|| sign(W) / ||sign(W)||, ||W_t|| = ||W_0||",
            feedback_constraint=SignConcordance(strict=True),
            kernel_constraint=ConstantNorm(),
        ),
        Method(
            name="fa_usf_const_ei",
            title="FA-uSF Const. E/I",
            definition="as FA-uSF Const., each weight keeps the sign of W_0",
            feedback_constraint=SignConcordance(strict=True),
            kernel_constraint=Chain([FixedSign(), ConstantNorm()]),
        ),
        Method(
            name="bp_ei",
            title="BP E/I",
            definition="B = W, each weight keeps the sign of W_0",
            standing="our control",
            feedback_constraint=TiedKernel(),
            kernel_constraint=FixedSign(),
        ),
        Method(
            name="fa_usf_sn_ei",
            title="FA-uSF SN E/I",
            definition="as FA-uSF SN, each weight keeps the sign of W_0",
            standing="our control",
            feedback_constraint=SignConcordance(strict=True),
            kernel_constraint=FixedSign(),
        ),
    )
}


def get(identifier: str | Method) -> Method:
    """Resolves a method.

    Args:
        identifier: A name in `METHODS`, or a `Method` of one's own.

    Returns:
        A `Method`.

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(identifier, Method):
        return identifier
    if not isinstance(identifier, str) or identifier not in METHODS:
        raise ValueError(
            f"Unknown method {identifier!r}. Allowed: {', '.join(METHODS)}, "
            "or a keras_fa.methods.Method."
        )
    return METHODS[identifier]
