"""The running statistics of batch norm, for weights that the model does not have while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Forward = Callable[[nn.Module, Any], Any]

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
NO_BATCHES = "the data has no batches: there is nothing to compute statistics from."


class Norms:
    """The batch-norm layers of a model that keep statistics, and other statistics for them.

    Attributes:
        known: whether the other statistics may be used.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._norms: dict[str, _BatchNorm] = {
            name: part
            for name, part in model.named_modules()
            if isinstance(part, _BatchNorm) and part.running_mean is not None
        }
        self._own = {name: tensor.detach().clone() for name, tensor in self._of_model().items()}
        self.known = False
        self._is_noted = False

    def __bool__(self) -> bool:
        return bool(self._norms)

    @property
    def stale(self) -> bool:
        """Whether those of the model have moved in training, and no others are known."""
        if self.known:
            return False
        return any(not torch.equal(tensor, self._own[name].to(tensor)) for name, tensor in self._of_model().items())

    def forget(self) -> None:
        """Other weights, and statistics, may be loaded now: what moves is seen from the next `note` on."""
        self._is_noted = False

    @torch.no_grad()
    def note(self) -> None:
        """Of the calls in training the first one remembers the statistics: those that stay as they are, are frozen."""
        if not (self._is_noted or self.known):
            self._keep()
        self._is_noted = True

    @torch.no_grad()
    def wear(self) -> None:
        """Gives the model the other statistics, if they are known. The caller takes them off again."""
        if self.known:
            for name, tensor in self._of_model().items():
                tensor.copy_(self._own[name])

    @torch.no_grad()
    def recompute(self, data: Iterable[Any], forward: Forward | None) -> None:
        """Computes the other statistics with the model, whose mode, buffers and random state are the caller's.

        Those of frozen layers stay: layers that are in evaluation mode in a model that is in training mode.
        """
        frozen = [norm for norm in self._norms.values() if self._model.training and not norm.training]
        self._model.train()
        for norm in frozen:
            norm.train(False)
        norms = [norm for norm in self._norms.values() if norm.training]  # a model's own `train` may leave some out
        momenta = [norm.momentum for norm in norms]
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # torch's sign for a cumulative average
            num_batches = sum(1 for batch in data if _evaluate(self._model, batch, forward))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        if not num_batches:
            raise ValueError(NO_BATCHES)
        self._keep()
        self.known = True

    def state(self) -> dict[str, Tensor]:
        """The other statistics, by name."""
        return dict(self._own)

    def _keep(self) -> None:
        for name, tensor in self._of_model().items():
            self._own[name].copy_(tensor)

    def _of_model(self) -> dict[str, Tensor]:
        return {f"{name}.{s}": getattr(norm, s) for name, norm in self._norms.items() for s in STATISTICS}


def _evaluate(model: nn.Module, batch: Any, forward: Forward | None) -> bool:
    (forward or forward_inputs)(model, batch)
    return True


def forward_inputs(model: nn.Module, batch: Any) -> Any:
    """Calls the model with a tensor, the first entry of a tuple or list, or a mapping as keyword arguments."""
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise ValueError(
            f"a batch holds a {type(batch).__name__}, not a tensor. Say how to evaluate it with "
            "forward=lambda model, batch: ..."
        )
    return model(batch.to(device))
