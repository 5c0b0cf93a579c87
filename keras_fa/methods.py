"""The rows of the paper's table, and what stands beside them, as values.

`METHODS` maps the name of a row to a `Method`: how feedback starts, the rule
that makes B of it, what constrains the forward kernel, which callbacks it
brings, and how errors are wired. `keras_fa.convert` reads it.

Six are not in the paper. "bp_ei", backpropagation under the fixed signs of the
E/I rows, tells what the signs cost by themselves; "fa_usf_sn_ei", E/I with the
magnitudes of SN, what the random magnitudes do; "fa_usf_init_ei_silent" reads
sign(0) as 0, so that B has the zeros of W. "brsf" is sign concordance
whose magnitudes are drawn anew at each step; "frsf", the one of fixed
magnitudes, is another name of "fa_usf_init". "fixed_sign_feedback" tells what
concordance at the start is worth if the signs do not follow. Under "frozen"
hidden kernels do not learn: what is no better has learned nothing there that
shows. Biases and normalization do learn, as they do under every method, and so
does a kernel that is not hidden, the readout's.

```python
from keras_fa.methods import METHODS

method = METHODS["fa_usf_sn"]
assert method.title == "FA-uSF SN"
assert [type(c).__name__ for c in method.callbacks()] == ["StrictNormalization"]
assert METHODS["fa"].callbacks() == []
```
"""

import dataclasses
import difflib
from collections.abc import Callable

import keras

from keras_fa._types import Identifier
from keras_fa.callbacks import MirrorPhase
from keras_fa.callbacks import RefuseAverages
from keras_fa.callbacks import StrictNormalization
from keras_fa.callbacks import TargetLoss
from keras_fa.constraints import Chain
from keras_fa.constraints import ConstantNorm
from keras_fa.constraints import FixedSign
from keras_fa.constraints import Frozen
from keras_fa.constraints import NoisyKernel
from keras_fa.constraints import ProductFeedback
from keras_fa.constraints import RandomMagnitude
from keras_fa.constraints import SignConcordance
from keras_fa.constraints import TiedKernel
from keras_fa.initializers import KernelSign
from keras_fa.learning import ActivationAlignment
from keras_fa.learning import InformationAlignment
from keras_fa.learning import KolenPollack
from keras_fa.learning import SymmetricAlignment
from keras_fa.learning import WeightMirror
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
        feedback_learning: As the argument of FA layers.
        kernel_constraint: Added to the layer's own kernel constraint.
        hidden_kernel_constraint: The same for hidden kernel layers alone: those
            from whose output another kernel layer can be reached, however
            models are nested in each other.
        wiring: `"chain"`: errors go down layer by layer. `"direct"`: DFA.
            `"dense"`: DenseFA.
        map_initializer: The law of the fixed random maps of DFA and DenseFA,
            each drawn independently: a Keras initializer or its name. `None`
            is Glorot uniform. An instance without a seed draws anew in each
            conversion.
        map_learning: What moves these maps: as the argument
            `feedback_learning` of `keras_fa.layers.direct.SendError`.
        direct_signal: What DFA sends: `"error"`, or in its place `"target"`,
            where the loss is the softmax or sigmoid cross-entropy.
        callback_classes: What `callbacks()` makes besides. Nothing depends on
            it: SN is strict by its rule, and its callback is there for loops
            that were written with one.
    """

    name: str
    title: str
    definition: str
    standing: str = "our reading"
    feedback_initializer: Identifier = None
    feedback_constraint: Identifier = None
    feedback_regularizer: Identifier = None
    feedback_learning: Identifier = None
    kernel_constraint: Identifier = None
    hidden_kernel_constraint: Identifier = None
    wiring: str = "chain"
    map_initializer: Identifier = None
    map_learning: Identifier = None
    direct_signal: str = "error"
    callback_classes: tuple[Callable[[], keras.callbacks.Callback], ...] = ()

    def callbacks(self) -> list[keras.callbacks.Callback]:
        """The callbacks that go with this method: a fresh list each time.

        With a `kernel_constraint`, `RefuseAverages` is among them.
        """
        made = [make() for make in self.callback_classes]
        return made + [RefuseAverages()] * (self.kernel_constraint is not None)


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
        Method(
            name="fa_usf_init_ei_silent",
            title="FA-uSF Init. E/I, silent zeros",
            definition="as FA-uSF Init. E/I, and where W is zero B is",
            standing="another reading of the paper's row",
            feedback_constraint=SignConcordance(),
            kernel_constraint=FixedSign(silent_zeros=True),
        ),
        Method(
            name="brsf",
            title="brSF",
            definition="B = |n| sign(W), n drawn anew at each step from the "
            "law of W_0",
            standing="Liao, Leibo & Poggio (2016)",
            feedback_constraint=RandomMagnitude(),
        ),
        Method(
            name="fixed_sign_feedback",
            title="FA of initial signs",
            definition="B = ||W_0|| sign(W_0) / ||sign(W_0)||, never updated",
            standing="our control",
            feedback_initializer=KernelSign(),
        ),
        Method(
            name="frozen",
            title="Frozen",
            definition="B = W, and the kernels of hidden layers stay as they "
            "are drawn: W = W_0",
            standing="our control",
            feedback_constraint=TiedKernel(),
            hidden_kernel_constraint=Frozen(),
        ),
        Method(
            name="kolen_pollack",
            title="Kolen-Pollack",
            definition="B as FA's, trained: dB = dW, both decay",
            standing="Kolen & Pollack (1994), Akrout et al. (2019)",
            feedback_learning=KolenPollack(),
        ),
        Method(
            name="weight_mirror",
            title="Weight mirror",
            definition="B as FA's, moved between batches along the correlation "
            "of noise xi and op(xi, W)",
            standing="Akrout et al. (2019)",
            feedback_learning=WeightMirror(),
            callback_classes=(MirrorPhase,),
        ),
        Method(
            name="symmetric_alignment",
            title="Symmetric alignment",
            definition="B as FA's, trained on |B|^2 / 2 - <W, B>",
            standing="Kunin et al. (2020)",
            feedback_learning=SymmetricAlignment(),
        ),
        Method(
            name="activation_alignment",
            title="Activation alignment",
            definition="B as FA's, trained on |op(x, B) - y|^2 / (2 |x|^2)",
            standing="Kunin et al. (2020)",
            feedback_learning=ActivationAlignment(),
        ),
        Method(
            name="information_alignment",
            title="Information alignment",
            definition="B as FA's, trained on (b |op^T(y, B)|^2 / 2 - "
            "a <y, op(x, B)>) / |x|^2 + c |B|^2 / 2",
            standing="Kunin et al. (2020)",
            feedback_learning=InformationAlignment(),
        ),
        Method(
            name="pfa",
            title="PFA",
            definition="B = R M, M fixed, random and wide, R trained: "
            "dR = dW M^T, both decay",
            standing="Ji-An & Benna (2024)",
            feedback_constraint=ProductFeedback(),
            feedback_learning=KolenPollack(),
        ),
        Method(
            name="direct_kolen_pollack",
            title="Direct Kolen-Pollack",
            definition="DFA whose maps are trained on the product of e and the "
            "receiver's activity, maps and kernels decay",
            standing="Webster et al. (2021)",
            feedback_constraint=TiedKernel(),
            wiring="direct",
            map_initializer="glorot_uniform",
            map_learning=KolenPollack(),
        ),
        Method(
            name="drtp",
            title="DRTP",
            definition="DFA that sends -t in the place of e, t the target, "
            "under softmax or sigmoid cross-entropy",
            standing="Frenkel et al. (2021)",
            feedback_constraint=TiedKernel(),
            wiring="direct",
            map_initializer="glorot_uniform",
            direct_signal="target",
            callback_classes=(TargetLoss,),
        ),
    )
}

# Names that others have for the same.
_ALIASES = {"frsf": "fa_usf_init"}


def get(identifier: str | Method) -> Method:
    """Resolves a method.

    Args:
        identifier: A name in `METHODS`, `"frsf"`, which is what Liao, Leibo &
            Poggio (2016) call `"fa_usf_init"`, or a `Method` of one's own.

    Returns:
        A `Method`.

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(identifier, Method):
        return identifier
    known = isinstance(identifier, str)
    name = _ALIASES.get(identifier, identifier) if known else None
    if name not in METHODS:
        near = difflib.get_close_matches(str(identifier).lower(), METHODS, 1)
        raise ValueError(
            f"Unknown method {identifier!r}"
            + (f"; did you mean {near[0]!r}? " if near else ". ")
            + f"Allowed: {', '.join(METHODS)}, or a keras_fa.methods.Method."
        )
    return METHODS[name]
