"""What a run says of itself while it trains."""

import dataclasses
import sys
import time

import keras

EVERY = 60.0  # seconds


def in_words(seconds: float) -> str:
    """A time, roughly."""
    if seconds != seconds:
        return "an unknown time"
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    hours, minutes = divmod(minutes, 60)
    return f"about {hours} h {minutes} min" if hours else f"about {minutes} min"


@dataclasses.dataclass(eq=False)
class Console(keras.callbacks.Callback):
    """Says how far a run is, and how long it will take.

    Once a minute within an epoch where Keras shows no progress bar, and after
    each whole epoch as long as a minute or more is left of the run. The first
    steps, which compile, are not counted. Epochs are those of the whole run,
    steps those of an epoch.
    """

    epochs: int
    steps: int

    def __post_init__(self) -> None:
        super().__init__()

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._epoch = epoch
        self._first = self._done = None
        # An epoch that was left inside has fewer steps than others.
        self._steps = (self.params or {}).get("steps") or self.steps
        self._said = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._began = batch, now
        self._done = batch - self._first
        if not self._done or now - self._said < EVERY or sys.stdout.isatty():
            return
        self._said = now
        left = self._steps - batch - 1
        left += (self.epochs - self._epoch - 1) * self.steps
        pace = (now - self._began) / self._done
        print(
            f"epoch {self._epoch + 1} of {self.epochs}, step {batch + 1} of "
            f"{self._steps}; {in_words(left * pace)} left",
            flush=True,
        )

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if not self._done or self._steps < self.steps:
            return
        pace = (time.monotonic() - self._began) / self._done
        left = (self.epochs - epoch - 1) * self.steps * pace
        if left >= EVERY:
            print(f"{in_words(left)} left", flush=True)
