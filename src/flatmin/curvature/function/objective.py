"""The function whose curvature is measured: the mean loss over a data set, of chosen parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flatmin.curvature.function.arguments import check_model, choose_parameters, loss_of, reduction_of
from flatmin.curvature.function.arithmetic import listening, one_path, rounding_of
from flatmin.curvature.function.batches import (
    NO_BATCHES,
    Batch,
    SampleCount,
    check_data,
    forward_pair,
    generators,
    pair,
)
from flatmin.curvature.function.members import Members
from flatmin.curvature.function.sharded import NOT_POSSIBLE, Holders, gradients
from flatmin.distributed import reshard
from flatmin.place import Place, displaced, refuse_if_cached, warn_if_away
from flatmin.quiet import undisturbed
from flatmin.shards import any_sharded
from flatmin.vectors import Vector

Sum = TypeVar("Sum", Vector, Tensor)
Forward = Callable[[nn.Module, Any], tuple[Any, Any]]


class NotFinite(ValueError):
    """The loss of a batch is nan or infinite."""


class Objective:
    """L(w) = 1/N sum_i loss(w; sample i), the mean over all samples of `data`.

    Batches are weighted by their number of samples, so a short last batch changes nothing (of a criterion that is no
    mean over samples, with class weights or `ignore_index`, L depends on how the data is cut into batches). That number
    is the leading dimension of the first tensor in the targets, else in the batch; dicts, lists and objects are looked
    into. Nothing is changed by measuring: mode, gradients, buffers, random state and weights are as before.

    Args:
        model: a module; one made by `torch.compile` is measured on the module it wraps.
        criterion: `criterion(outputs, targets)`, a mean over the batch (or a sum, if it says
            `reduction = "sum"`); `None` if the model returns its own loss.
        data: anything that can be iterated more than once and yields batches. A pair (inputs, targets) by default.
        forward: `forward(model, batch) -> (outputs, targets)`, for batches of any other kind. The leading dimension of
            targets counts the samples that a batch is weighted by: of time-major ones return the transpose.
        params: what to differentiate by: `None` for all trainable parameters, names, or a predicate
            `(name, parameter) -> bool`.
        eval_mode: measure in evaluation mode (dropout off, batch norm with its running statistics).
        group: a `torch.distributed` process group whose members have the same weights, and each a part of the data
            (e.g. `torch.distributed.group.WORLD`). N is then the number of all samples, and every member gets the same
            loss, gradient and product, for one all-reduce each. Parts may have different numbers of batches, but all
            members must measure the same things in the same order. Of a model that FSDP2 shards (`fully_shard`) the
            group is that of the shards, given or not: each process has its part of the data, one batch at least.

    Sharded models: `.params` and vectors are sharded too. A batch is one batch of each process, evaluated together, so
    that probes equal those of one process which measures such joined batches. Products are differences of gradients.

    Raises:
        ValueError: a `forward` that returns no pair, no batches, a one-shot iterator, no parameters, a loss that is not
            a finite scalar, batches whose number of samples cannot be told, two passes over the data that disagree;
            parameters that are sharded otherwise than by FSDP2, only some that are sharded, or a group of other
            processes than hold the shards.

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
        group: Any = None,
    ):
        check_model(model, criterion)
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.criterion = criterion
        self.data = check_data(data)
        self.eval_mode = eval_mode
        self._forward = forward or forward_pair
        reshard(self.model)
        chosen = choose_parameters(self.model, params)
        self._holders = Holders(self.model, chosen, group) if any_sharded(chosen.values()) else None
        self.names: tuple[str, ...] = tuple(chosen)
        self.params: tuple[Tensor, ...] = tuple(chosen.values())
        group = group if self._holders is None else self._holders.group
        self.members = Members(group, self.params[0].device, joint=self.sharded)
        self.members.check_share(self.data)
        self._num_samples: int | None = None
        self._rounding = max(rounding_of(p) for p in self.params)  # of the coarsest number on the way to the loss

    def __repr__(self) -> str:
        model, criterion = type(self.model).__name__, self.criterion
        of = "its own loss" if criterion is None else getattr(criterion, "__name__", type(criterion).__name__)
        return f"Objective({model}, {of}, {self.num_params} parameters)"

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

    @property
    def group(self) -> Any:
        """The process group whose members have the other batches, or `None`."""
        return self.members.group

    @property
    def sharded(self) -> bool:
        """Whether every process holds a part of each parameter only (FSDP2)."""
        return self._holders is not None

    def refuse_sharded(self, what: str) -> None:
        """Raises a `ValueError` that says what to do instead of `what`, if the parameters are sharded."""
        if self.sharded:
            raise ValueError(NOT_POSSIBLE.format(what=what))

    def only(self, names: Iterable[str]) -> Objective:
        """The same loss as a function of these parameters alone, by name.

        Raises:
            ValueError: for a name that is not among `names`, or none at all.
        """
        keep = {names} if isinstance(names, str) else set(names)
        if not keep:
            raise ValueError(f"only() was given no names. The objective has: {', '.join(self.names)}.")
        if wrong := sorted(keep - set(self.names)):
            raise ValueError(f"{wrong[0]!r} is not a parameter of this objective. It has: {', '.join(self.names)}.")
        chosen = [(n, p) for n, p in zip(self.names, self.params, strict=True) if n in keep]
        other = copy.copy(self)
        other.names, other.params = tuple(n for n, _ in chosen), tuple(p for _, p in chosen)
        return other

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, the model may be evaluated; on leaving everything is as before."""
        warn_if_away(self.params, "measuring")
        refuse_if_cached()
        own = [(generator, generator.get_state()) for generator in generators(self.data)]
        others = [self.criterion] if isinstance(self.criterion, nn.Module) else []
        try:
            with undisturbed(self.model, *others, eval_mode=self.eval_mode), self._undisturbed_shards(), one_path():
                yield
        finally:
            for generator, state in own:
                generator.set_state(state)

    @contextmanager
    def displaced(self) -> Iterator[Place]:
        """Inside, the weights may be moved and the model evaluated; on leaving all is as before, bit for bit."""
        with displaced(self.params) as place, self.quiet():
            yield place

    def _undisturbed_shards(self) -> AbstractContextManager[None]:
        return nullcontext() if self._holders is None else self._holders.quiet()

    def forward(self, content: Any) -> tuple[Any, Any]:
        """Outputs and targets of what the data yields."""
        if self.sharded:
            reshard(self.model)  # the weights may have moved since they were gathered
        outputs, targets = pair(self._forward(self.model, content))
        self._rounding = max(self._rounding, rounding_of(outputs))
        return outputs, targets

    def batches(self) -> Iterator[Batch]:
        """The batches, not yet evaluated; whoever iterates evaluates each of them."""
        count = 0
        for batch in self._own_batches() if self._holders is None else self._holders.batches(self):
            yield batch
            count += batch.size
        if count == 0:
            raise ValueError(NO_BATCHES)
        self._num_samples = count

    def _own_batches(self) -> Iterator[Batch]:
        samples = SampleCount()
        for content in self.data:
            yield Batch(self, content, samples)

    def batch_losses(self) -> Iterator[tuple[Tensor, int]]:
        """The mean loss of each batch, with its graph if gradients are enabled, and its number of samples.

        Whoever iterates deletes the loss before asking for the next: a loop variable would keep its graph alive.
        """
        for batch in self.batches():
            result = [(batch.evaluate().loss, batch.size)]
            del batch  # what a batch leaves must be gone when the next one is evaluated
            yield result.pop()

    def loss(self) -> float:
        """L(w), summed in float64. One forward pass over the data."""
        with self.quiet():
            return self._mean_loss()[0]

    @torch.no_grad()
    def _mean_loss(self) -> tuple[float, float]:
        """The mean loss, and the mean size of what was added up for it."""
        total, size, count = 0.0, 0.0, 0
        for loss, n in self.batch_losses():
            value = n * float(loss.double())
            total, size, count = total + value, size + abs(value), count + n
            self._rounding = max(self._rounding, rounding_of(loss))
        mean, mean_size = self.mean(torch.tensor([total, size], dtype=torch.float64, device="cpu"), count).tolist()
        return mean, mean_size

    def mean(self, total: Sum, count: int) -> Sum:
        """`total / count`, both added up over the processes of the group: one all-reduce, none without a group.

        Over sharded parameters the batches are joint ones, and nothing is left to be added up.

        Args:
            total: a sum over samples, a Vector or a tensor.
            count: how many samples.
        """
        sums, count = self.members.sums(total.present if isinstance(total, Vector) else [total], count)
        self._num_samples = count
        total = total.with_present(sums) if isinstance(total, Vector) else sums[0]  # type: ignore[assignment]
        return total / count

    def gradient(self) -> Vector:
        """The gradient of L. One forward and one backward pass."""
        return self.loss_and_gradient()[1]

    def loss_and_gradient(self) -> tuple[float, Vector]:
        """L(w), summed in float64, and its gradient. One forward and one backward pass.

        Raises:
            RuntimeError: if the loss cannot be differentiated.
        """
        with self.quiet(), torch.enable_grad():
            value, total, count = 0.0, self.zeros(), 0
            for loss, n in self.batch_losses():
                grads = gradients(loss, self.params)
                value += n * float(loss.detach().double())
                total, count = total.add_(Vector(grads) * float(n)), count + n
                del loss, grads
        sums = self.mean(
            Vector([*total.present, torch.tensor(value, dtype=torch.float64, device="cpu")]), count
        ).present
        return float(sums[-1]), Vector(sums[:-1])

    def zeros(self) -> Vector:
        """The zero vector of parameter space."""
        return Vector(torch.zeros_like(p, requires_grad=False) for p in self.params)

    @property
    def tolerance(self) -> float:
        """The relative difference that rounding may make between two passes over the data.

        A shuffling loader rounds other batches: in single precision that is far below 1e-5, in half precision not.
        """
        return max(1e-5, 2 * self._rounding)

    @property
    def rounding(self) -> float:
        """The relative rounding of the coarsest numbers on the way to the loss, as far as it has been evaluated."""
        return self._rounding

    def check(self) -> float:
        """L(w), after making sure that a second pass over the data gives the same number.

        Raises:
            ValueError: if it does not: a derivative of a function that changes between calls means nothing.
        """
        with self.quiet():  # one context: the random state goes on from the first pass to the second
            with listening(self.hear):
                first, size = self._mean_loss()
            second, _ = self._mean_loss()
        if abs(first - second) > self.tolerance * size:
            raise ValueError(
                f"two passes over the data give different losses ({first:.7g} and {second:.7g}), so there is no "
                f"function to differentiate. {self._suspect()}"
            )
        return first

    def hear(self, _module: nn.Module, _inputs: object, outputs: object) -> None:
        """A hook for `listening`: whatever a module computes may be coarser than the loss."""
        self._rounding = max(self._rounding, rounding_of(outputs))

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
        state = ""
        if isinstance(self.criterion, nn.Module) and (self.criterion.training or any(self.criterion.buffers())):
            state = f", or {type(self.criterion).__name__} may have a state or be random (its mode is left as it is)"
        return (
            f"The model is in evaluation mode, so look at the data: {type(self.data).__name__} may augment or sample "
            f"at random{state}. Pass a fixed list of batches, e.g. list(loader)."
        )

    def batch_loss(self, outputs: Any, targets: Any, count: int) -> Tensor:
        """The mean loss of a batch of `count` samples, from its outputs: a scalar; a finite one, unless sharded."""
        loss = loss_of(self.criterion, outputs, targets)
        if reduction_of(self.criterion) == "sum":
            loss = loss / count
        # Sharded, the mean over all processes is checked, so that all of them raise.
        return loss.reshape(()) if self.sharded else self.check_loss(loss.reshape(()), count)

    def check_loss(self, loss: Tensor, count: int) -> Tensor:
        """`loss`, the mean over `count` samples, if it is finite.

        Raises:
            NotFinite: (a ValueError) if it is not.
        """
        if not math.isfinite(value := loss.item()):
            raise NotFinite(f"the loss is {value} on a batch of {count}: there is nothing to measure.")
        return loss
