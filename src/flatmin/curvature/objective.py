"""The function whose curvature is measured: the mean loss over a data set, of chosen parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.quiet import undisturbed
from flatmin.vectors import Vector

Forward = Callable[[nn.Module, Any], tuple[Any, Any]]


class Objective:
    """L(w) = 1/N sum_i loss(w; sample i), the mean over all samples of `data`.

    Batches are weighted by their number of samples, so a short last batch changes nothing. Nothing is changed by
    measuring: mode, gradients, buffers, random state and weights are as before.

    Args:
        model: a module; one made by `torch.compile` is measured on the module it wraps.
        criterion: `criterion(outputs, targets)`, a mean over the batch (or a sum, if it says
            `reduction = "sum"`); `None` if the model returns its own loss.
        data: anything that can be iterated more than once and yields batches. A pair (inputs, targets) by default.
        forward: `forward(model, batch) -> (outputs, targets)`, for batches of any other kind.
        params: what to differentiate by: `None` for all trainable parameters, names, or a predicate
            `(name, parameter) -> bool`.
        eval_mode: measure in evaluation mode (dropout off, batch norm with its running statistics).

    Raises:
        ValueError: no batches, a one-shot iterator, no parameters, a loss that is not a finite scalar, or two
            passes over the data that disagree.

    Example:
        objective = Objective(model, nn.CrossEntropyLoss(), loader)
        flatmin.trace(objective)
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor] | None,
        data: Iterable[Any],
        *,
        forward: Forward | None = None,
        params: Iterable[str] | Callable[[str, Tensor], bool] | None = None,
        eval_mode: bool = True,
    ):
        _check_arguments(model, criterion)
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.criterion = criterion
        self.data = _check_data(data)
        self.eval_mode = eval_mode
        self._forward = forward or _forward_pair
        chosen = _choose(self.model, params)
        self.names: tuple[str, ...] = tuple(chosen)
        self.params: tuple[Tensor, ...] = tuple(chosen.values())
        self._num_samples: int | None = None

    @property
    def num_params(self) -> int:
        """The number of scalars that are differentiated by."""
        return sum(p.numel() for p in self.params)

    @property
    def num_samples(self) -> int:
        """The number of samples in the data (known after the first pass)."""
        if self._num_samples is None:
            self.loss()
        assert self._num_samples is not None
        return self._num_samples

    @property
    def layers(self) -> tuple[str, ...]:
        """The module that each parameter belongs to, by name."""
        return tuple(name.rpartition(".")[0] or name for name in self.names)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, the model may be evaluated; on leaving everything is as before."""
        with undisturbed(self.model, eval_mode=self.eval_mode):
            yield

    def batch_losses(self) -> Iterator[tuple[Tensor, int]]:
        """The mean loss of each batch, with its graph if gradients are enabled, and its number of samples."""
        total = 0
        for batch in self.data:
            outputs, targets = self._forward(self.model, batch)
            count = _count(batch, targets)
            total += count
            yield self._batch_loss(outputs, targets, count), count
        if total == 0:
            raise ValueError("the data has no batches: an empty loader has no loss to measure.")
        self._num_samples = total

    def loss(self) -> float:
        """L(w), summed in float64. One forward pass over the data."""
        with self.quiet():
            return self._mean_loss()

    @torch.no_grad()
    def _mean_loss(self) -> float:
        total, count = 0.0, 0
        for loss, n in self.batch_losses():
            total, count = total + n * float(loss.double()), count + n
        return total / count

    def gradient(self) -> Vector:
        """The gradient of L. One forward and one backward pass."""
        with self.quiet():
            total, count = self.zeros(), 0
            for loss, n in self.batch_losses():
                grads = torch.autograd.grad(loss, self.params, allow_unused=True, materialize_grads=True)
                total, count = total.add_(Vector(grads) * float(n)), count + n
        return total / count

    def zeros(self) -> Vector:
        """The zero vector of parameter space."""
        return Vector(torch.zeros_like(p, requires_grad=False) for p in self.params)

    def check(self) -> float:
        """L(w), after making sure that a second pass over the data gives the same number.

        Raises:
            ValueError: if it does not: a derivative of a function that changes between calls means nothing.
        """
        with self.quiet():  # one context: the random state goes on from the first pass to the second
            first, second = self._mean_loss(), self._mean_loss()
        if abs(first - second) > 1e-5 * max(abs(first), abs(second)):
            raise ValueError(
                f"two passes over the data give different losses ({first:.7g} and {second:.7g}), so there is no "
                f"function to differentiate. {self._suspect()}"
            )
        return first

    def _suspect(self) -> str:
        if not self.eval_mode:
            random = [n for n, m in self.model.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
            if random:
                return f"In training mode these modules are random: {', '.join(random[:5])}. Use eval_mode=True."
            return (
                "In training mode a model may be random (functional dropout), and batch norm makes the loss depend "
                "on which samples share a batch, so a shuffling loader gives another function every time. Use "
                "eval_mode=True, or a fixed list of batches."
            )
        return (
            f"The model is in evaluation mode, so look at the data: {type(self.data).__name__} may augment or sample "
            "at random. Pass a fixed list of batches, e.g. list(loader)."
        )

    def _batch_loss(self, outputs: Any, targets: Any, count: int) -> Tensor:
        own = self.criterion is None
        loss = getattr(outputs, "loss", outputs) if own else self.criterion(outputs, targets)  # type: ignore[misc]
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the criterion must return a scalar tensor, got {shape}. Use reduction='mean'.")
        if getattr(self.criterion, "reduction", "mean") == "sum":
            loss = loss / count
        if not torch.isfinite(loss.detach()):
            raise ValueError(f"the loss is {float(loss.detach())} on a batch of {count}: there is nothing to measure.")
        return loss.reshape(())


def _check_arguments(model: object, criterion: object) -> None:
    if isinstance(criterion, type):
        raise ValueError(f"criterion is the class {criterion.__name__}, not a function: write {criterion.__name__}().")
    if not isinstance(model, nn.Module) or isinstance(model, nn.modules.loss._Loss):
        raise ValueError(f"the model comes first and is a torch.nn.Module, got {type(model).__name__}.")
    if criterion is not None and not callable(criterion):
        raise ValueError(f"criterion must be a function (outputs, targets) -> loss, got {type(criterion).__name__}.")
    if torch.is_inference_mode_enabled():
        raise ValueError("derivatives cannot be taken inside torch.inference_mode(): measure outside of it.")


def _check_data(data: Iterable[Any]) -> Iterable[Any]:
    if isinstance(data, Iterator):
        raise ValueError(
            f"data is a one-shot iterator ({type(data).__name__}), but measuring takes several passes. Pass a "
            "DataLoader or a list of batches."
        )
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        raise ValueError("data is an (inputs, targets) pair, not a list of batches: write [(inputs, targets)].")
    if hasattr(data, "__len__") and len(data) == 0:  # type: ignore[arg-type]
        raise ValueError("the data has no batches: an empty loader has no loss to measure.")
    return data


def _choose(model: nn.Module, params: Any) -> Mapping[str, Tensor]:
    named = dict(model.named_parameters())
    if params is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
    elif callable(params):
        chosen = {name: p for name, p in named.items() if params(name, p)}
    else:
        names = [params] if isinstance(params, str) else list(params)
        missing = [name for name in names if name not in named]
        if missing:
            raise ValueError(f"no parameter is called {missing[0]!r}. The model has: {', '.join(named)}.")
        chosen = {name: named[name] for name in names}
    frozen = [name for name, p in chosen.items() if not p.requires_grad]
    if frozen:
        raise ValueError(f"{frozen[0]!r} is frozen: call requires_grad_() on it, or leave it out of params.")
    if not chosen:
        raise ValueError("no parameters to differentiate by: all are frozen, or params selects none.")
    return chosen


def _forward_pair(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise ValueError(
            f"a batch is a {type(batch).__name__}, not an (inputs, targets) pair. Say how to evaluate it with "
            "forward=lambda model, batch: (outputs, targets)."
        )
    device = next(model.parameters()).device
    inputs, targets = (x.to(device) if isinstance(x, Tensor) else x for x in batch)
    return model(inputs), targets


def _count(batch: Any, targets: Any) -> int:
    """The number of samples: the leading dimension of the targets, else of the first tensor in the batch."""
    if isinstance(targets, Tensor) and targets.ndim == 0:
        raise ValueError(
            "the targets of a batch have no batch dimension. If data is a Dataset, its items are single samples: pass "
            "DataLoader(dataset, batch_size=...)."
        )
    for item in (targets, *(batch.values() if isinstance(batch, Mapping) else batch)):
        if isinstance(item, Tensor) and item.ndim > 0:
            return item.shape[0]
    return 1
