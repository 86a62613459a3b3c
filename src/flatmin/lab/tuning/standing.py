"""Steps that leave the weights where they are: with a learning rate of 0, to see and to time what a method does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from flatmin.lab.parts import Training
from flatmin.lab.train import ALONE


class Standing:
    """A method at the weights that the model has.

    Args:
        model: in training or evaluation mode, as it is.
        training: the loss, and what is done around a step.
        optimizer: the method around a base; its learning rates become 0.
    """

    def __init__(self, model: nn.Module, training: Training, optimizer: Optimizer):
        self._model, self._training, self._optimizer = model, training, optimizer
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self._evaluate = training.evaluation(optimizer)

    def step(self, batch: tuple[Tensor, Tensor], look: Callable[[], Any] = lambda: None) -> None:
        """One step; `look` is called at each probe, with the weights displaced."""

        def loss() -> Tensor:
            look()
            return self._evaluate(self._model, batch)

        ALONE.step(self._optimizer, loss)
        self._training.after_step()
