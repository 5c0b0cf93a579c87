"""A program that is asked to end."""

import signal
import threading
from typing import Self

# A batch system sends the first, Ctrl-C the second.
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Termination:
    """Hears SIGTERM and Ctrl-C while it is entered, and notes it.

    A second Ctrl-C interrupts as ever. In a thread other than the main one,
    where Python hears no signals, it hears nothing.

    Attributes:
        asked: Whether the program was asked to end.
    """

    asked = False

    def __enter__(self) -> Self:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *error: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _hear(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
