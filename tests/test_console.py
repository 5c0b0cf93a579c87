"""What a run says of itself while it trains."""

import main  # noqa: F401 - before all that imports Keras
import pytest

from experiment import console
from experiment.console import Console
from experiment.console import in_words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (float("nan"), "an unknown time"),
        (20, "less than a minute"),
        (100, "about 2 min"),
        (2 * 3600 + 130, "about 2 h 2 min"),
    ],
)
def test_times_in_words(seconds, words):
    assert in_words(seconds) == words


def test_time_that_is_left(monkeypatch, capsys):
    """3 epochs of 10 steps, each of 30 seconds."""
    clock = iter(range(0, 3000, 30))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    said = Console(epochs=3, steps=10)
    said.set_params({"steps": 10})
    said.on_epoch_begin(0)
    for batch in range(10):
        said.on_train_batch_end(batch)
    said.on_epoch_end(0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 + 1  # one a minute, and one of the epoch
    # After 2 of 30 steps 28 are left, of 30 seconds each.
    assert lines[0] == "epoch 1 of 3, step 2 of 10; about 14 min left"
    assert lines[-1] == "about 11 min left"  # 20 steps of 33 seconds


def test_short_runs_say_nothing(capsys):
    said = Console(epochs=2, steps=1)
    said.on_epoch_begin(0)
    said.on_train_batch_end(0)
    said.on_epoch_end(0)  # as at the end of an epoch that was left inside
    assert capsys.readouterr().out == ""
