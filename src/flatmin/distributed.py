"""The processes that train one model together: whose gradients they exchange when, and what they agree on.

    DDP      every process holds all the weights; backward averages the gradients (one all-reduce of their size)
    FSDP2    every process holds a shard of the weights; backward averages the gradients into shards

What one process alone decides (a loss that is not finite, an overflow) would let it skip a step that the others take,
so such decisions are made by all together. Nothing is exchanged before a model of several processes is known: the
parameters are sharded, or a `DistributedDataParallel` around some of them was named or met in a forward.
"""

from __future__ import annotations

import itertools
import secrets
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.module import _global_forward_pre_hooks
from torch.nn.parallel import DistributedDataParallel

from flatmin.checks import check_whole
from flatmin.shards import is_sharded

AVAILABLE = distributed.is_available()
_DIGIT = 2**12
_CALLS = itertools.count()

FSDP1 = (
    "FullyShardedDataParallel (FSDP1) hides from an optimizer which part of each parameter it holds, so that norms and "
    "noise would be wrong. Use torch.distributed.fsdp.fully_shard (FSDP2; in Accelerate fsdp_version=2)."
)
STATIC_GRAPH = (
    "DistributedDataParallel(static_graph=True) has to average gradients in its first backward, and this one must not: "
    "the gradients of several probes are averaged together (NSO in a loop), or each process looks for itself (SAM). "
    "Use static_graph=False; or a closure for NSO, sync_ascent=True for SAM."
)
LOST = (
    "flatmin: another process died, or did not come along within the time-out of the process group "
    "(torch.distributed.init_process_group(timeout=...)). The weights of this one are where they were before the step. "
    "Start all processes again from the last checkpoint."
)


def explain(error: RuntimeError) -> None:
    """Adds what to do to the error of a collective that failed."""
    if several() and (isinstance(error, distributed.DistError) or any(b in str(error) for b in ("gloo", "NCCL"))):
        error.add_note(LOST)


@contextmanager
def explained() -> Iterator[None]:
    """Explains the errors of the body."""
    try:
        yield
    except RuntimeError as error:
        explain(error)
        raise


def rank() -> int:
    """The number of this process among those of the default group; 0 if there is none."""
    return distributed.get_rank() if AVAILABLE and distributed.is_initialized() else 0


def several() -> bool:
    """Whether `torch.distributed` runs with more than one process."""
    return AVAILABLE and distributed.is_initialized() and distributed.get_world_size() > 1


def random_seed() -> int:
    """A really random number, the same on all processes for their n-th call.

    The first to come leaves its own in the store of the process group. That is no collective: a process that never
    asks keeps nobody waiting.
    """
    seed = secrets.randbits(63)
    if not several():
        return seed
    store, key = distributed.distributed_c10d._get_default_store(), f"flatmin/seed/{next(_CALLS)}"
    if store.add(f"{key}/callers", 1) == 1:
        store.set(key, str(seed))
    return int(store.get(key))


def seed_of(seed: int | None) -> int:
    """`seed`, if it is a whole number, or for `None` a really random one.

    Raises:
        ValueError: for anything else.
    """
    return random_seed() if seed is None else check_whole("seed", seed)


def summed_over(group: Any, tensors: Sequence[Tensor], count: int) -> tuple[list[Tensor], int]:
    """The sums of `tensors` and `count` over the processes of `group`, by one all-reduce of all numbers together.

    Numbers are added up in the widest dtype among them, fp32 at least; tensors on one device.
    """
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    # In two digits: fp32 cannot hold a large count.
    digits = torch.tensor([count // _DIGIT, count % _DIGIT], dtype=dtype, device=tensors[0].device)
    flat = torch.cat([*(t.detach().flatten().to(dtype) for t in tensors), digits])
    with explained():
        distributed.all_reduce(flat, group=group)
    parts = flat.split([*(t.numel() for t in tensors), 2])
    high, low = parts[-1].tolist()
    sums = [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=False)]
    return sums, int(high) * _DIGIT + int(low)


def _is_known(group: Any) -> bool:
    """Whether torch lists the group, as it does with all that its functions make, until they are destroyed."""
    return group in distributed.distributed_c10d._world.pg_map


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was applied to."""
    return [module for module in model.modules() if _is_fsdp(module)]


def _is_fsdp(module: Any) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)  # never before somebody has imported it


def refuse_fsdp1(module: nn.Module) -> None:
    """Its parameters are ordinary tensors with a part each: norms, noise and skips would be those of one process."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
        raise ValueError(FSDP1)


def reshard(model: nn.Module) -> None:
    """Frees gathered weights, so that the parameters of `model` are the sharded ones, and the next pass gathers anew.

    After a forward pass without a backward one (an evaluation) the root keeps its weights gathered, and they do not
    follow when the shards move.
    """
    for module in fsdp_modules(model):
        module.reshard()


class Ranks:
    """The processes that share a set of parameters, as one optimizer sees them.

    Args:
        params: the parameters.
        model: where to look for `DistributedDataParallel` and `fully_shard`, before the forwards of the probes.

    Attributes:
        num_params: the number of parameters.
        kept_apart: whether the caller's `no_sync` kept gradients of this evaluation from being averaged.
    """

    def __init__(self, params: Sequence[Tensor], model: nn.Module | None = None):
        self.num_params = len(params)
        self._params = {id(p) for p in params}
        # Those that no wrapper is known for yet. While there are some, every forward of a probe is looked at; else the
        # first ones, up to that of a wrapper, which may be a new one.
        self._unwrapped = set(self._params)
        self._ungathered = {id(p) for p in params if is_sharded(p)}
        self._device = params[0].device
        # In an order that is the same on all processes: one that waits in another group would wait for ever.
        meshes = dict.fromkeys(p.device_mesh for p in params if is_sharded(p))  # type: ignore[attr-defined]
        groups = (group for mesh in meshes for group in mesh.get_all_groups())
        self._groups: dict[Any, bool] = {group: _is_known(group) for group in groups}  # whether torch knew it then
        self._replicas: list[weakref.ref[DistributedDataParallel]] = []
        self._shards: list[weakref.ref[Any]] = []  # the modules that FSDP2 gathers weights for
        self._exchange, self.kept_apart = True, False
        self._active = False  # there is something to settle
        self._silenced: list[DistributedDataParallel] = []
        named = [] if model is None else list(model.modules())
        # A compiled model would trace the hook that searches.
        self._search = not self._groups and not any(hasattr(part, "_orig_mod") for part in named)
        for part in named:
            self._meet(part)
            self._meet_shards(part)

    @property
    def alone(self) -> bool:
        """Whether there is no other process, and nothing that was made for several."""
        return not (self._groups or self._replicas or self._shards or several())

    def probe(self, exchange: bool) -> None:
        """Before an evaluation: whether its backward may average gradients over the processes."""
        self._exchange, self.kept_apart = exchange, False
        self._forget_dead()
        if not (several() or self._shards or self._ungathered):
            return
        self._active = True
        self._put_back()
        self.go_on()
        if self._search:  # also where all are wrapped: this forward may be that of another wrapper around the same
            _global_forward_pre_hooks[id(self)] = self._meet  # in torch's table itself: see flatmin.quiet
        elif self._ungathered:
            _global_forward_pre_hooks[id(self)] = self._meet_shards

    def go_on(self) -> None:
        """Before another forward of the same evaluation: a caller's `no_sync` may have ended in between."""
        for known in self._replicas:
            self._silence(known())

    def settle(self) -> None:
        """After an evaluation, raised or not; may be called again."""
        if self._active:
            self._put_back()
            self._active = False

    def _put_back(self) -> None:
        _global_forward_pre_hooks.pop(id(self), None)
        self._reshard()
        for replica in self._silenced:
            replica.require_backward_grad_sync = True
        self._silenced = []

    @property
    def reuse_gradients(self) -> bool:
        """Whether gradients are views of DDP's buckets, which the next backward overwrites."""
        for known in self._replicas:
            replica = known()
            if replica is not None and replica.gradient_as_bucket_view:
                return True
        return False

    def agree(self, flag: bool) -> bool:
        """Whether `flag` is true on any of the processes. One all-reduce of one number; nothing with one process."""
        if not self._groups:
            return flag
        value = torch.tensor(float(flag), device=self._device)
        with explained():
            for group in self._groups:
                distributed.all_reduce(value, distributed.ReduceOp.MAX, group=group)
        return bool(value)

    def _meet(self, module: nn.Module, _args: object = ()) -> None:
        if torch.compiler.is_compiling():
            return
        module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
        refuse_fsdp1(module)
        if not isinstance(module, DistributedDataParallel):
            return
        if all(known() is not module for known in self._replicas):
            if not any(id(p) in self._params for p in module.parameters()):
                return
            self._replicas.append(weakref.ref(module))
            self._unwrapped -= {id(p) for p in module.parameters()}
            self._groups.setdefault(module.process_group, _is_known(module.process_group))
        if not self._unwrapped and (self._exchange or module.require_backward_grad_sync):
            # All are found; a compiled part must not see the hook. Inside a caller's `no_sync`, which will switch
            # averaging on again, the next forward of this probe has to be met too.
            _global_forward_pre_hooks.pop(id(self), None)
        self._silence(module)

    def _forget_dead(self) -> None:
        """Looks again for what wraps the parameters of a wrapper that is no more: there may be a new one.

        A group that was destroyed (`destroy_process_group`) has nobody left to agree with.
        """
        self._groups = {group: known for group, known in self._groups.items() if not known or _is_known(group)}
        alive = [known for known in self._replicas if known() is not None]
        if len(alive) < len(self._replicas):
            self._replicas = alive
            wrapped = [p for known in alive if (replica := known()) is not None for p in replica.parameters()]
            self._unwrapped = self._params - {id(p) for p in wrapped}

    def _meet_shards(self, module: nn.Module, _args: object = ()) -> None:
        if torch.compiler.is_compiling():
            return
        for part in fsdp_modules(module) if _is_fsdp(module) else ():
            if all(known() is not part for known in self._shards):  # else it may be in the middle of its forward
                self._shards.append(weakref.ref(part))
                part.reshard()
                self._ungathered -= {id(p) for p in part.parameters()}

    def _reshard(self) -> None:
        """Weights move in their shards: what is gathered of them from before, or of a probe, is of another place."""
        for known in self._shards:
            if (module := known()) is not None:
                module.reshard()

    def _silence(self, replica: DistributedDataParallel | None) -> None:
        """What `no_sync` does; DDP looks at this when its forward begins. A caller's own `no_sync` stays."""
        if replica is None:
            return
        if self._exchange:
            self.kept_apart |= not replica.require_backward_grad_sync
        elif replica.require_backward_grad_sync:
            if replica.static_graph:
                raise ValueError(STATIC_GRAPH)
            self._silenced.append(replica)
            replica.require_backward_grad_sync = False
