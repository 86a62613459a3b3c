"""Measuring a model whose parameters are sharded by FSDP2 (`fully_shard`): all processes evaluate it together.

A forward pass gathers the weights block by block and a backward pass scatters the gradients; every process takes part
in both. So

    a batch      is one batch of each process, evaluated together; its loss is the mean over the samples of all. A
                 process that has no more evaluates its last one again, with weight 0
    a gradient   comes by `backward()` through `.grad`, for FSDP2 has no other way. The loss of each process is scaled
                 so that the average that FSDP2 takes over processes is the mean over samples
    a product    is a difference of gradients: what gathers and scatters cannot be differentiated twice
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from flatmin.curvature.function.batches import Batch, Evaluated, SampleCount
from flatmin.curvature.function.members import NO_SHARE
from flatmin.distributed import explained, fsdp_modules, reshard
from flatmin.shards import any_sharded, is_sharded

if TYPE_CHECKING:
    from flatmin.curvature.function.objective import Objective

GATHER = (
    "Gather the model: make it anew without fully_shard and load get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict into it on every "
    "process; the data may stay in parts (group=...)."
)
NOT_POSSIBLE = (
    "{what} is not possible here: the parameters are sharded (FSDP2). Losses and gradients can be had, and products as "
    f"differences of gradients, but nothing can be differentiated twice. {GATHER}"
)
NOT_EXCHANGED = (
    "the model does not exchange gradients (set_requires_gradient_sync(False)), or some of an accumulation wait to be "
    "exchanged: finish the accumulation, and measure with set_requires_gradient_sync(True)."
)
NO_GRAPH = (
    "the loss has no graph: the model or the criterion leaves autograd (detach(), item(), numpy, argmax, no_grad). "
    "Give one that can be differentiated; trace, noise_stability and average_sharpness also take losses alone."
)
END = object()


def gradients(loss: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradient of `loss`, zero for a parameter that it does not use.

    Of sharded parameters by `backward()`; inside `Objective.quiet()`, which keeps what `.grad` was.

    Raises:
        RuntimeError: as autograd does, where there is nothing to differentiate.
    """
    if not loss.requires_grad:
        raise RuntimeError(NO_GRAPH)
    if not any_sharded(params):
        grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        return tuple(g.detach() for g in grads)  # torch 2.6 makes zeros that require gradients
    loss.backward()
    found = tuple(torch.zeros_like(p, requires_grad=False) if p.grad is None else p.grad for p in params)
    for p in params:
        p.grad = None
    return found


class Holders:
    """The processes that hold the shards of a model, as they measure it.

    Args:
        model: with `fully_shard` applied.
        params: those chosen, by name.
        group: of processes, or `None` for that of the parameters' mesh.

    Attributes:
        group: the processes.

    Raises:
        ValueError: a parameter that is sharded otherwise or not at all, or a group of other processes.
    """

    def __init__(self, model: nn.Module, params: Mapping[str, Tensor], group: Any):
        self._model = model
        self._groups = [g for module in fsdp_modules(model) for g in _parameter_groups(module)]
        if not self._groups:
            raise ValueError(f"the parameters are sharded, but not by FSDP2 (fully_shard). {GATHER}")
        self._mesh = _mesh_of(params)
        self.group = _group_of(self._mesh, group)
        self._params = list(model.parameters())
        self._device = next(iter(params.values())).device

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, the model may be evaluated and differentiated; on leaving gradients and shards are as before."""
        if not all(map(_exchanges, self._groups)):
            raise ValueError(NOT_EXCHANGED)
        kept = [(p, p.grad) for p in self._params]
        try:
            for p in self._params:
                p.grad = None
            yield
        finally:
            reshard(self._model)
            for p, grad in kept:
                p.grad = grad

    def batches(self, objective: Objective) -> Iterator[JointBatch]:
        """One batch of each process at a time, until none has any. Cost: one all-reduce of one number for each."""
        own, content, samples = iter(objective.data), END, SampleCount()
        while present := self._how_many_have(following := next(own, END)):
            if content is END and present < distributed.get_world_size(self.group):
                raise ValueError(NO_SHARE)
            idle = following is END
            content = content if idle else following
            yield JointBatch(objective, content, samples, self, idle=idle)

    def mean(self, loss: Tensor, weight: int) -> tuple[Tensor, int]:
        """The mean loss over the samples of all processes, and their number.

        Its value is the same on all. Its gradient is that of this process's share, as FSDP2 wants it: the average over
        processes, which backward takes, is the gradient of the mean.

        Args:
            loss: the mean loss of this process's batch.
            weight: the samples that it counts for.

        Cost: one all-reduce of two numbers.
        """
        sums = torch.tensor([float(loss.detach().double()) * weight, weight], dtype=torch.float64, device=self._device)
        with explained():
            distributed.all_reduce(sums, group=self.group)
        total, count = sums.tolist()
        share = loss * (weight * self._divisor() / count)
        value = torch.tensor(total / count, dtype=loss.dtype, device=loss.device)
        return value + (share - share.detach()), int(count)

    def _how_many_have(self, following: object) -> int:
        flag = torch.tensor(0 if following is END else 1, device=self._device)
        with explained():
            distributed.all_reduce(flag, group=self.group)
        return int(flag)

    def _divisor(self) -> float:
        """What FSDP2 divides a sum of gradients by: the number of processes, unless it was told otherwise."""
        own = {getattr(g, "gradient_divide_factor", None) or self._mesh.size() for g in self._groups}
        if len(own) > 1:
            raise ValueError(f"the parts of the model divide gradients by different factors ({own}). {GATHER}")
        return own.pop()


class JointBatch(Batch):
    """One batch of each process. `loss` is the mean over all of them; outputs and targets are this process's own."""

    def __init__(
        self, objective: Objective, content: Any, samples: SampleCount, holders: Holders, *, idle: bool = False
    ):
        super().__init__(objective, content, samples)
        self._holders, self._idle = holders, idle
        self._count: int | None = None

    @property
    def size(self) -> int:
        """The number of samples of all processes; known after the first evaluation."""
        assert self._count is not None
        return self._count

    def evaluate(self) -> Evaluated:
        """A forward pass by all processes, with its graph if gradients are enabled."""
        here = super().evaluate()
        loss, self._count = self._holders.mean(here.loss, 0 if self._idle else super().size)
        return Evaluated(self._objective.check_loss(loss, self._count), here.outputs, here.targets)


def _parameter_groups(module: Any) -> Sequence[Any]:
    state = module._get_fsdp_state()  # what follows has setters that are public, and no getters
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [state._fsdp_param_group] if state._fsdp_param_group else []


def _exchanges(group: Any) -> bool:
    waiting = any(p.unsharded_accumulated_grad is not None for p in group.fsdp_params)
    return group.reduce_grads and group.all_reduce_grads and not waiting


def _mesh_of(params: Mapping[str, Any]) -> Any:
    """The mesh of all parameters."""
    for name, p in params.items():
        if not is_sharded(p):
            raise ValueError(f"{name!r} is not sharded (FSDP2), other parameters are. Leave it out with params=.")
    first, *others = params.values()
    if any(p.device_mesh != first.device_mesh for p in others):
        raise ValueError(f"the parameters are sharded over different processes. {GATHER}")
    for name, p in params.items():
        *outer, last = p.placements
        if not (last.is_shard() and all(placement.is_replicate() for placement in outer)):
            raise ValueError(f"{name!r} is not sharded as FSDP2 does it, but {p.placements}. {GATHER}")
    return first.device_mesh


def _group_of(mesh: Any, group: Any) -> Any:
    """The group of all processes of the mesh: the one given, or the mesh's own."""
    members = sorted(mesh.mesh.flatten().tolist())
    if group is None and mesh.ndim == 1:
        return mesh.get_group()
    given = distributed.group.WORLD if group is None else group
    if sorted(distributed.get_process_group_ranks(given)) != members:
        missing = "the parameters are sharded over a mesh of several dimensions: give" if group is None else "give"
        raise ValueError(f"{missing} group= with the processes that hold the shards, which are {members}.")
    return given
