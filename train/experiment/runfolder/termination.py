"""A program that is asked to end."""

import signal
import sys
import threading
from typing import Self

# A batch system sends the first, Ctrl-C the second.
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Termination:
    """Hears SIGTERM and Ctrl-C while it is entered, and notes it.

    Ctrl-C interrupts as ever while there is nothing to save, and where it comes
    a second time. What a program's caller has it ignore it ignores. In a thread
    other than the main one, where Python hears no signals, it hears nothing.

    Attributes:
        asked: Whether the program was asked to end.
        interrupted: Whether by Ctrl-C.
        saves: Whether there is something to save first.
    """

    asked = False
    interrupted = False
    saves = False

    def __enter__(self) -> Self:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    previous = signal.signal(number, self._hear)
                    self._previous[number] = previous
        return self

    def __exit__(self, *error: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _hear(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:
            if self.interrupted or not self.saves:
                raise KeyboardInterrupt
            self.interrupted = True
            # Below Keras's progress bar, where there is one.
            print(
                "\n" * sys.stdout.isatty()
                + "Stopping after this step; Ctrl-C again interrupts at once.",
                file=sys.stderr,
                flush=True,
            )
        self.asked = True
