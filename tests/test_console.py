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
    """3 epochs of 11 steps, each of 30 seconds, after a slow first one."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    said = Console(epochs=3, steps=11)
    said.set_params({"steps": 11})
    said.on_epoch_begin(0)
    now[0] = 1000.0
    for batch in range(11):
        said.on_train_batch_end(batch)
        now[0] += 30
    said.on_epoch_end(0)
    lines = capsys.readouterr().out.splitlines()
    # After 2 of 33 steps 31 are left; the first one does not count.
    assert lines[0] == "epoch 1 of 3, step 2 of 11; about 16 min left"
    assert lines[-1] == "about 12 min left"  # 22 steps of 33 seconds
    assert len(lines) == 5 + 1  # one a minute, and one of the epoch


def test_parts_of_epochs_and_short_runs_say_nothing(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    said = Console(epochs=100, steps=10)
    said.set_params({"steps": 2})  # an epoch that was left inside
    said.on_epoch_begin(0)
    for batch in range(2):
        now[0] += 40
        said.on_train_batch_end(batch)
    said.on_epoch_end(0)
    assert "left" in capsys.readouterr().out.splitlines()[0]
    said = Console(epochs=2, steps=1)
    said.on_epoch_begin(0)
    said.on_epoch_end(0)  # as where all steps were done
    assert capsys.readouterr().out == ""
