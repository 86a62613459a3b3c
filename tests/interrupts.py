"""KeyboardInterrupt at a chosen line of flatmin's code, as a signal might raise it."""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any

from torch import nn

TRAINING = ("flatmin.optim", "flatmin.place", "flatmin.vectors", "flatmin.noise")


class Interrupt:
    """Looks at the lines that run inside, in the modules whose names begin with one of `rooms`."""

    def __init__(self, rooms: tuple[str, ...] = TRAINING):
        self._rooms = rooms

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        """At every call of a function, in torch too: gives what looks at its lines."""
        return self._look(frame) if frame.f_globals.get("__name__", "").startswith(self._rooms) else None

    def _look(self, frame: FrameType) -> Any:
        raise NotImplementedError

    def __enter__(self):
        self.outer = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.outer)


class InterruptAt(Interrupt):
    """Interrupts the n-th line."""

    def __init__(self, line: int, rooms: tuple[str, ...] = TRAINING):
        super().__init__(rooms)
        self.remaining = line

    def _look(self, frame: FrameType) -> Any:
        def at(frame: FrameType, event: str, arg: object) -> Any:
            if event == "line":
                self.remaining -= 1
                if self.remaining == 0:
                    raise KeyboardInterrupt
            return at

        return at


class Places:
    """Where a step may be: a line, with the lines that called it.

    Attributes:
        numbers: (number of the place that made the call, code, line) -> the number of this place.
        met: where a step was interrupted: (number, evaluation of the step, whether for the first time).
    """

    def __init__(self) -> None:
        self.numbers: dict[tuple[int, CodeType, int], int] = {}
        self.met: set[tuple[int, int, bool]] = set()


class InterruptAtANewPlace(Interrupt):
    """Interrupts the first place where no step was interrupted before.

    From the third evaluation of a step on, and from the second pass over a place, the others are taken for the same.

    Attributes:
        raised: whether there was one.
        waits: while true, nothing is interrupted.
    """

    def __init__(self, model: nn.Module, places: Places, *, waits: bool = False):
        super().__init__()
        self.waits = waits
        self._places = places
        self._passed: set[int] = set()
        self._place = self._evaluation = 0
        self.raised = False
        model.register_forward_hook(self._evaluated)

    def _evaluated(self, *_: object) -> None:
        self._evaluation = min(self._evaluation + 1, 3)

    def _look(self, frame: FrameType) -> Any:
        caller, code, numbers = self._place, frame.f_code, self._places.numbers

        def at(frame: FrameType, event: str, arg: object) -> Any:
            if event == "line":
                self._place = numbers.setdefault((caller, code, frame.f_lineno), len(numbers) + 1)
                self._arrive()
            elif event == "return":
                self._place = caller
            return at

        return at

    def _arrive(self) -> None:
        here = self._place, self._evaluation, self._place not in self._passed
        self._passed.add(self._place)
        if not self.waits and here not in self._places.met:
            self._places.met.add(here)
            self.raised = True
            raise KeyboardInterrupt
