"""What a run says of itself while it trains."""

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


class Console(keras.callbacks.Callback):
    """Says how far a run is, and how long it will take.

    Once a minute within an epoch where Keras shows no progress bar, and after
    each epoch as long as a minute or more is left of the run.

    Args:
        epochs: Of the whole run.
        steps: Of an epoch.
    """

    def __init__(self, epochs: int, steps: int) -> None:
        super().__init__()
        self.epochs = epochs
        self.steps = steps

    @property
    def _steps(self) -> int:
        """Of this epoch: one that was left inside has fewer than others."""
        return (self.params or {}).get("steps") or self.steps

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._epoch = epoch
        self._began = self._said = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        now = time.monotonic()
        if now - self._said < EVERY or sys.stdout.isatty():
            return
        self._said = now
        steps = self._steps
        left = steps - batch - 1 + (self.epochs - self._epoch - 1) * self.steps
        pace = (now - self._began) / (batch + 1)
        print(
            f"epoch {self._epoch + 1} of {self.epochs}, step {batch + 1} of "
            f"{steps}; {in_words(left * pace)} left",
            flush=True,
        )

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        pace = (time.monotonic() - self._began) / self._steps
        left = (self.epochs - epoch - 1) * self.steps * pace
        if left >= EVERY:
            print(f"{in_words(left)} left", flush=True)
