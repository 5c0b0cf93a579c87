"""The digits, read row by row by an LSTM."""

import json
import re

import main  # before all that imports Keras
import pytest


@pytest.fixture
def train(tmp_path, capfd):
    def run(*arguments):
        folder = tmp_path / "runs"
        arguments = ["--model=digits_lstm", *arguments]
        status = main.run(["main.py", f"--runs_dir={folder}", *arguments])
        return status, folder, capfd.readouterr().err

    return run


def test_it_learns(train):
    status, folder, errors = train(
        "--method=fa",
        "--epochs=6",
        "--learning_rate=0.01",
        "--alignment_every=6",
    )
    assert (status, errors) == (0, "")
    (run,) = folder.iterdir()
    result = json.loads((run / "result.json").read_text())
    # W, U and b of four gates, and the readout; a guess is wrong in 90 %.
    assert result["parameters"] == 4 * 64 * (8 + 64 + 1) + 65 * 10
    assert result["test_error"] < 45
    head = (run / "history.csv").read_text().splitlines()[0]
    assert "lstm_cell/recurrent_kernel" in head


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            "--method=symmetric_alignment",
            "--method=symmetric_alignment: SymmetricAlignment learns of",
        ),
        (
            "--normalization=batch",
            "--normalization=batch: digits_lstm has no hidden ReLU",
        ),
    ],
)
def test_refused(arguments, says, train):
    status, folder, errors = train(arguments)
    assert status == 1
    assert re.fullmatch(r"main\.py: .+\n", errors), errors
    assert says in errors
    assert not folder.exists()
