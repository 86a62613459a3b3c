"""What a method may use to build its rule: weights, radii, noise, and what it remembers."""

from __future__ import annotations

from torch import Tensor, nn

from flatmin.distributed import Ranks, rank
from flatmin.noise import Noise, Scale, mix_seeds
from flatmin.optim.engine.host import Host
from flatmin.optim.engine.memory import Memory
from flatmin.radii import Radii
from flatmin.shards import any_sharded
from flatmin.vectors import Vector

ONE_PLACE = (
    "noise_per_rank=True needs a place for each process, but the parameters are sharded (FSDP2), so that all processes "
    "look at one place. Use DistributedDataParallel, or a larger num_perturbations."
)

PERTURB_REPLACED = (
    "none of the parameters of perturb= is in the optimizer any more: something has replaced its parameters by others "
    "(as Accelerate's prepare does under FSDP2), and nothing would be perturbed. Give the others radius 0 in a group "
    "of their own instead."
)


class Tools(Host):
    """Read-only views of the parameters and their options, and the method's own stream of random numbers."""

    _low_memory: bool
    _memory: Memory | None
    _model: nn.Module | None
    _num_draws: int
    _perturbed: list[Tensor] | None
    _radii: Radii | None  # those of the step under way
    _every: int
    _start: int
    _ranks: Ranks | None

    @property
    def params(self) -> list[Tensor]:
        """All parameters, in group order."""
        return [p for group in self.base.param_groups for p in group["params"]]

    def weights(self) -> Vector:
        """The weights themselves, not a copy: to read, while the rule is not waiting for a gradient."""
        assert self.reads_weights, f"the rule of {type(self).__name__} reads the weights: let the class say so"
        return Vector([p.detach() for p in self.params])

    def radii(self) -> Radii:
        """The radius of each parameter, read from the groups (0 where it is frozen, or not to be perturbed)."""
        if self._radii is not None:
            return self._radii
        name, moved = self.radius_name, self._perturbed
        values: list[float] = []
        for group in self.base.param_groups:
            radius = float(group[name])
            values += [radius if p.requires_grad else 0.0 for p in group["params"]]
        if moved is not None:
            chosen, params = {id(p) for p in moved}, self.params
            if chosen and chosen.isdisjoint(map(id, params)):
                raise ValueError(PERTURB_REPLACED)
            values = [r if id(p) in chosen else 0.0 for r, p in zip(values, params, strict=True)]
        return Radii(values)

    @property
    def num_perturbed(self) -> int:
        """How many steps before this one were perturbed, of those that `every`, `start` and `stop` leave."""
        return (self.num_steps - self._start) // self._every

    @property
    def memory(self) -> Memory:
        """What the rule remembers between steps."""
        if self._memory is None:
            empty = not self.param_groups[0].get("num_remembered")
            self._memory = Memory(self.params, self.state, self.remembers, found_once=self.finds_once, empty=empty)
        return self._memory

    @property
    def ranks(self) -> Ranks:
        """The processes that share the parameters."""
        if self._ranks is None:
            self._ranks = Ranks(self.params, self._model)
        return self._ranks

    def new_seed(self) -> int:
        """The next seed of this step's stream: a function of the method's seed, the step and the draw."""
        self._num_draws += 1
        return mix_seeds(self.param_groups[0]["seed"], self.num_steps, self._num_draws - 1)

    def noise(
        self, law: str = "normal", radii: Radii | None = None, scale: Scale = "absolute", *, per_rank: bool = False
    ) -> Noise:
        """A fresh displacement `radius * z`, the next of this step's stream; `per_rank`, of this process's stream."""
        assert scale == "absolute" or self.reads_weights
        radii, seed = self.radii() if radii is None else radii, self.new_seed()
        if per_rank:
            seed = mix_seeds(seed, rank())
            if any_sharded(self.params):
                raise ValueError(ONE_PLACE)
        return Noise(self.params, radii, law, seed, scale=scale, keep=not self._low_memory)
