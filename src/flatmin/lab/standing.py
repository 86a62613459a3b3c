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
        criterion: the loss, a mean over the batch.
        optimizer: the method around a base; its learning rates become 0.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module, optimizer: Optimizer):
        self._model, self._optimizer = model, optimizer
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self._evaluate = Training(model, criterion, {}, num_steps=1, epoch=1, num_classes=None).evaluation(optimizer)

    def step(self, batch: tuple[Tensor, Tensor], look: Callable[[], Any] = lambda: None) -> None:
        """One step; `look` is called at each probe, with the weights displaced."""

        def loss() -> Tensor:
            look()
            return self._evaluate(self._model, batch)

        ALONE.step(self._optimizer, loss)
