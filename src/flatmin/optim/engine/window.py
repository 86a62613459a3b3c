"""A step inside somebody else's loop: micro-batches arrive one at a time, and the framework evaluates them.

    for each micro-batch, as it comes:   away(), the framework's forward and backward, home()
    at the end of the window:            finish() evaluates all micro-batches again for each later probe
    then, in the framework:              unscale, clip, step

The first probe is evaluated by the framework's own passes, so that no pass is wasted and losses, logs and batch-norm
statistics are those of an ordinary step. In between the weights are at home: a validation or a checkpoint in the middle
of a window sees them. Each later evaluation of a micro-batch sees the random numbers of its first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flatmin.optim.engine.optimizer import FlatOptimizer
from flatmin.optim.engine.scaling import Scaling
from flatmin.quiet import RandomState, random_state, set_random_state


class Window:
    """One step of `optimizer` over the micro-batches of a framework's accumulation window.

    Args:
        optimizer: of the step.
        model: the model that is evaluated, with its wrappers: what the later evaluations do to its buffers is undone,
            and a `DistributedDataParallel` around it exchanges gradients as often as the method needs.
        scaler: the framework's `torch.amp.GradScaler`, or `None`. The direction is handed back scaled.
    """

    def __init__(self, optimizer: FlatOptimizer, model: nn.Module, scaler: Any = None):
        optimizer.name_model(model)
        self._optimizer = optimizer
        self._session = optimizer._open("window", Scaling(scaler, optimizer.params, rescale=True))
        self._displacement: Any = None
        self._states: list[RandomState] = []
        self._devices = {p.device for p in optimizer.params}

    def away(self) -> None:
        """Before the framework evaluates the next micro-batch: the weights go to the first probe."""
        if not self._states:
            self._displacement = next(self._session).displacement
        elif self._optimizer._place is not None:
            self._optimizer._place.move(self._displacement)
            self._optimizer.ranks.go_on()
        self._states.append(random_state(self._devices))

    def home(self) -> None:
        """After its backward: the weights come back."""
        if self._optimizer._place is not None:
            self._optimizer._place.home()

    def finish(self, evaluate: Callable[[int], Any]) -> None:
        """Evaluates the later probes and leaves the direction in `.grad`.

        Args:
            evaluate: does the forward and backward of the micro-batch of that number, as the framework did.
        """
        self._displacement = None
        for _ in self._session:
            for number, state in enumerate(self._states):
                set_random_state(state)
                with torch.enable_grad():
                    evaluate(number)

    def close(self) -> None:
        """Drops what is left of the step: after an exception, or when the framework skips it."""
        self._session.close()
        self._optimizer.zero_grad()
