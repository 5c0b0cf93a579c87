"""BioTorch as a peer: the same network on PyTorch, timed in turn with ours.

It runs in processes of its own, one for each mode, so that neither library
shares an allocator, an OpenMP runtime or thread settings with the other, and
Keras is timed in the same process as without a peer. One that is not in turn
sleeps: PyTorch's threads spin for less than 10 ms after their last operation,
and TensorFlow's do not, which is over before the first step of the next
block, itself not timed, has ended.
A process takes one line, what to build; then it trains a block of steps and
answers with one line, the seconds of one step, for each line that it gets.
"""

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiment.errors import UserError

PROGRAMS = Path(__file__).parents[2]  # where `experiment` is imported from
INSTALL = "pip install torch && pip install --no-deps biotorch"
# The row in the table: BioTorch's own name for it, and our nearest row. Its
# uSF has one fixed magnitude for each kernel.
MODES = {
    "BioTorch BP": "backpropagation",
    "BioTorch FA": "fa",
    "BioTorch uSF": "usf",
}
COUNTERPARTS = {
    "BioTorch BP": "stock",
    "BioTorch FA": "fa",
    "BioTorch uSF": "fa_usf_sn",
}


def check() -> None:
    """Refuses to go on without BioTorch.

    Raises:
        UserError: If it is not installed.
    """
    missing = [
        name
        for name in ("torch", "biotorch")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UserError(
            f"--peer=biotorch: {' and '.join(missing)} is not installed. Use "
            f"{INSTALL}, or leave --peer out."
        )


class BioTorch:
    """BioTorch's counterpart of a stock Keras model, in a process of its own.

    The model is a chain of layers, the mode a value of `MODES`.

    Raises:
        UserError: If the model has a layer that is not known here, or if
            BioTorch fails.
    """

    def __init__(
        self, model: Any, mode: str, batch_size: int, steps: int
    ) -> None:
        order = {
            "layers": chain(model),
            "mode": mode,
            "input_shape": model.input_shape[1:],
            "batch_size": batch_size,
            "steps": steps,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=PROGRAMS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        ours = [model.count_params(), model.output_shape[-1]]
        theirs = self._ask(order)
        if theirs != ours:
            self.close()
            raise UserError(
                f"--peer=biotorch: its {model.name} has parameters and "
                f"outputs {theirs}, ours {ours}. Leave --peer out."
            )

    def __enter__(self) -> "BioTorch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def block(self) -> float:
        """Trains a block; the seconds of one step in it."""
        return self._ask(None)

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _ask(self, question: Any) -> Any:
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as wrong:
            self._process.kill()
            raise UserError(
                "--peer=biotorch: its process ended; above is what it said. "
                f"Install it anew ({INSTALL}), or leave --peer out."
            ) from wrong


def chain(model: Any) -> list[dict[str, Any]]:
    """The layers of a Keras model, as `torch_layers` takes them."""
    layers = []
    for layer in model.layers:
        kind, config = type(layer).__name__, layer.get_config()
        entry = {"kind": kind}
        if kind in ("Conv2D", "Dense"):
            entry["inputs"], entry["outputs"] = layer.kernel.shape[-2:]
            entry["relu"] = config["activation"] == "relu"
        if kind in ("Conv2D", "MaxPooling2D"):
            entry["size"] = config.get("kernel_size") or config["pool_size"]
            entry["strides"] = config["strides"]
            entry["same"] = config["padding"] == "same"
        if kind == "Dropout":
            entry["rate"] = config["rate"]
        if kind not in _TORCH_LAYERS:
            raise UserError(
                f"--peer=biotorch: layer '{layer.name}' ({kind}) of "
                f"{model.name} has no counterpart here. There are "
                f"{', '.join(_TORCH_LAYERS)}. Leave --peer or the network out."
            )
        layers.append(entry)
    return layers


# What follows runs in the process of BioTorch.


def _convolution(nn: Any, layer: dict) -> list:
    padding = [size // 2 if layer["same"] else 0 for size in layer["size"]]
    return [
        nn.Conv2d(
            layer["inputs"],
            layer["outputs"],
            layer["size"],
            layer["strides"],
            padding,
        )
    ]


def _pooling(nn: Any, layer: dict) -> list:
    padding = [size // 2 if layer["same"] else 0 for size in layer["size"]]
    return [nn.MaxPool2d(layer["size"], layer["strides"], padding)]


_TORCH_LAYERS = {
    "InputLayer": lambda nn, layer: [],
    "Conv2D": _convolution,
    "MaxPooling2D": _pooling,
    "Flatten": lambda nn, layer: [nn.Flatten()],
    "Dense": lambda nn, layer: [nn.Linear(layer["inputs"], layer["outputs"])],
    "Dropout": lambda nn, layer: [nn.Dropout(layer["rate"])],
    "GlobalAveragePooling2D": lambda nn, layer: [
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ],
}


def serve() -> None:
    """Answers the questions of `BioTorch`, on standard input and output."""
    order = json.loads(sys.stdin.readline())
    import torch

    with contextlib.redirect_stdout(io.StringIO()):  # it tells what it does
        from biotorch.module.biomodule import BioModule

        layers = []
        for layer in order["layers"]:
            layers += _TORCH_LAYERS[layer["kind"]](torch.nn, layer)
            layers += [torch.nn.ReLU()] if layer.get("relu") else []
        model = BioModule(torch.nn.Sequential(*layers), mode=order["mode"])
    height, width, channels = order["input_shape"]
    images = torch.randn(order["batch_size"], channels, height, width)
    classes = model(images).shape[-1]
    labels = torch.randint(classes, (order["batch_size"],))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9)
    loss_function = torch.nn.CrossEntropyLoss()

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_function(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    _answer([sum(p.numel() for p in trained), classes])
    for _ in sys.stdin:
        step().item()
        began = time.perf_counter()
        for _ in range(order["steps"]):
            loss = step()
        loss.item()
        _answer((time.perf_counter() - began) / order["steps"])


def _answer(value: Any) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    serve()
