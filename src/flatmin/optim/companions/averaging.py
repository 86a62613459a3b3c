"""Averages of the weights along the path of an optimizer, and evaluating the model with them.

An average is no optimizer: it watches any of them, a plain one or a `FlatOptimizer`, and leaves the path alone.
The arithmetic is that of torch's `AveragedModel`. What is our own is what surrounds it: when to average, in which
precision, how the average gets into the model and out again, and what batch norm needs there. Averages are entry by
entry, so those of shards (FSDP2) are shards, and nothing is exchanged for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.buffers import Buffers
from flatmin.distributed import reshard
from flatmin.notices import warn
from flatmin.optim.companions.iterates import Kind, first_step, next_share
from flatmin.optim.companions.norms import Forward, Norms
from flatmin.optim.engine.names import Known, matched
from flatmin.place import Place, warn_if_away
from flatmin.quiet import undisturbed
from flatmin.shards import any_sharded, is_sharded, part_of, parts

SHARDED = (
    "the statistics of batch norm are not recomputed for sharded parameters (FSDP2), of which each process would have "
    "its own. Load the average into a whole model (get_model_state_dict(model, options=StateDictOptions("
    "full_state_dict=True)) inside applied()), and let torch.optim.swa_utils.update_bn do it there."
)
STALE = (
    "the statistics of batch norm are those of the weights in training, not of the average that the model now has: "
    "what is evaluated with them is off. Call averager.refresh(loader) after the last update() and before applied()."
)
LONGER = (
    "update() was called more often than num_steps={num_steps} says: the tail began at step {first}, by its share of "
    "that length, so it is longer than was asked for. num_steps is the number of updates in the whole run."
)
INSIDE = "{what} inside `with averager.applied():`, where the model wears the average. Leave the body first."


class Averager:
    """An average of the weights along the path of any optimizer.

        mean    a_n = a_{n-1} + (w_n - a_{n-1}) / n             every iterate counts the same
        tail    the same, from step `start` on                  what came before is forgotten: SWA
        ema     a_n = decay a_{n-1} + (1 - decay) w_n, a_1 = w_1

    SGD with a large constant learning rate eta hovers around the minimum of a smoothed loss, E f(v - eta noise)
    (`flatmin.problems.smoothed_by_steps`), at a distance of order sqrt(eta); the mean of its path is within order eta
    of it. So do not decay the learning rate to zero while you average.

    Example:
        averager = flatmin.Averager(model, num_steps=len(loader) * epochs)
        for inputs, labels in batches:
            ...
            opt.step()
            averager.update()
        averager.refresh(loader)  # only if there is batch norm
        with averager.applied():
            evaluate(model)       # or torch.save(model.state_dict(), path)

    Before the first averaged step `applied()` gives the current weights.

    Args:
        model: in its final shape. Frozen parameters are averaged too (they stay what they are, and may be thawed
            later), tied ones once; integer parameters and all buffers are left alone.
        kind: "tail", "mean" or "ema".
        start: where a tail begins: a step (a whole number >= 1, the first one is 1), or a fraction of `num_steps`
            (0.75 averages the last quarter). The other kinds begin with the first step.
        num_steps: the length of the run, in calls of `update()`; a tail that began at a fraction of it warns when the
            run goes on.
        decay: of the exponential average, in [0, 1).
        every: average only after steps `every`, 2 `every`, ...; the number of steps in an epoch averages once an
            epoch, as SWA does.

    Cost: one pass over the weights an update, nothing where the step is not averaged; `benchmarks/averaging.py`
    compares it with a step. A `refresh` costs the forward passes of its data.

    Memory: a copy of the weights, in at least fp32 (bf16 and fp16 weights are accumulated in fp32); inside `applied()`
    another copy of the weights and buffers. Of sharded weights (FSDP2) each process keeps the average of its shards.

    Raises:
        ValueError: for an unknown `kind`, a `start`, `num_steps` or `every` by which no step would be averaged, a
            `decay` outside [0, 1), a model without weights. Later: if parameters were added,
            removed or replaced.

    Warns (RuntimeWarning): once, if the model gets the average while batch norm has the statistics of training.

    Source: Nitanda, Kikuchi, Maeda, Wu, "Why is Parameter Averaging Beneficial in SGD? An Objective Smoothing
    Perspective", AISTATS 2024, arXiv:2302.09376. Izmailov, Podoprikhin, Garipov, Vetrov, Wilson, "Averaging Weights
    Leads to Wider Optima and Better Generalization", UAI 2018, arXiv:1803.05407 (SWA: a tail, once an epoch).
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Kind = "tail",
        start: float = 0.75,
        num_steps: int | None = None,
        decay: float = 0.999,
        every: int = 1,
    ):
        self._first, self._every = first_step(kind, start, num_steps, every), every
        self._length = num_steps if kind == "tail" and start < 1 else None  # that the tail is a share of
        self._share = next_share(kind, decay)
        self._shown = model
        self._model = model = getattr(model, "_orig_mod", model)  # so that names are those without torch.compile
        reshard(model)
        self._known = Known(model)
        self._params = [p for p in self._known.parameters.values() if _can_be_averaged(p)]
        if not self._params:
            raise ValueError(f"{type(model).__name__} has no floating-point parameters to average.")
        self._sharded = any_sharded(self._params)
        self._averages = {name: _widened(p) for name, p in self._known.parameters.items() if _can_be_averaged(p)}
        self._norms = Norms(model)
        self._num_updates = 0
        self._num_averaged = 0
        self._warned = False  # of stale statistics
        self._place: Place | None = None  # while the model wears the average

    @property
    def num_averaged(self) -> int:
        """How many iterates are in the average."""
        return self._num_averaged

    def update(self) -> None:
        """Call it after each step of the optimizer; it averages where that is due.

        Raises:
            ValueError: inside `applied()`, or if the model has other parameters than before.
        """
        self._check_outside("update()")
        warn_if_away(self._model.parameters(), "an average is updated")
        if self._length is not None and self._num_updates >= self._length:
            warn(LONGER.format(num_steps=self._length, first=self._first), RuntimeWarning)
            self._length = None  # said once
        self._norms.note()
        step = self._num_updates + 1
        if step <= self._first:  # of a shorter run, resumed as a longer one: its tail came before this one
            self._num_averaged = 0
        due = step >= self._first and step % self._every == 0
        if due:
            self._include()
        if due or not self._num_averaged:
            self._norms.known = False  # what `applied()` shows has moved; its statistics were of another place
        self._num_updates = step

    def applied(self) -> AbstractContextManager[nn.Module]:
        """Inside, the model has the averaged weights; afterwards weights and buffers are as before, bit for bit.

        Everything is in place, so that optimizers, compiled models and captured graphs stay valid; and comes back also
        when the body raises. Batch norm has the statistics of the last `refresh`, if no iterate was averaged since,
        else those of training, which are not right for the average (that warns, once, unless they are frozen or the
        model is sharded). Mode is left to you (`model.eval()`). A training step inside is refused.

        Raises:
            ValueError: inside another `applied()`, or if the model has other parameters than before.
        """
        if not (self._warned or self._sharded) and self._num_averaged and self._norms.stale:
            self._warned = True
            warn(STALE, RuntimeWarning)
        return self._worn()

    @contextmanager
    def _worn(self) -> Iterator[nn.Module]:
        self._check_outside("applied()")
        self._check_parameters()
        place, buffers = Place(self._params), Buffers(self._model.modules())
        try:
            try:
                self._place = place
                place.announce(worn=True)
                place.move(_Average(list(self._averages.values()), shown=self._num_averaged > 0))
                self._norms.wear()
                yield self._shown
            finally:
                self._leave(place, buffers)
        finally:
            self._leave(place, buffers)  # a second time: an interrupt may have cut the first one off

    def refresh(self, data: Iterable[Any], forward: Forward | None = None) -> None:
        """Recomputes the running statistics of batch norm for the averaged weights, as torch's `update_bn` does.

        One pass over `data` in training mode, each batch counting the same. The model itself is left as it was:
        weights, statistics, momentum, mode and torch's random state. Nothing is done without batch norm.

        Args:
            data: batches of training data.
            forward: (model, batch) evaluates the model; what it returns is not used, so that the one given to
                `flatmin.measure` serves. By default the model is called with a tensor, with the first entry of a tuple
                or list, or with a mapping as keyword arguments, on the device of its parameters.

        Raises:
            ValueError: inside `applied()`, without batches, for a batch that needs a `forward`, or for batch norm in a
                sharded model.
        """
        self._check_outside("refresh()")
        if self._norms and self._sharded:
            raise ValueError(SHARDED)
        if self._norms:
            with self._worn(), undisturbed(self._model, eval_mode=False):
                self._norms.recompute(data, forward)

    def state_dict(self) -> dict[str, Any]:
        """Counts, averages and refreshed statistics: numbers and tensors (not copies), by name.

        The arguments of the constructor are not among them: give them again. Averages of shards are DTensors, for
        `torch.distributed.checkpoint`, which loads into what the state of a fresh Averager has.
        """
        return {
            "num_updates": self._num_updates,
            "num_averaged": self._num_averaged,
            "averages": dict(self._averages) if self._num_averaged or self._sharded else {},
            "statistics": self._norms.state() if self._norms.known else {},
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave; where this tail begins later than that one, from its own beginning.

        Raises:
            ValueError: inside `applied()`, or for the state of another model (nothing is loaded then).
        """
        self._check_outside("load_state_dict()")
        pairs = matched(state_dict["averages"], self._averages)
        pairs += matched(state_dict["statistics"], self._norms.state())
        for mine, loaded in pairs:
            mine.copy_(part_of(loaded, mine) if is_sharded(mine) and not is_sharded(loaded) else loaded)
        self._num_updates, self._num_averaged = state_dict["num_updates"], state_dict["num_averaged"]
        self._norms.known = bool(state_dict["statistics"])
        self._norms.forget()

    def _leave(self, place: Place, buffers: Buffers) -> None:
        self._reshard()
        place.home()
        place.withdraw()
        buffers.put_back()
        self._place = None

    def _include(self) -> None:
        self._check_parameters()
        averages = parts(list(self._averages.values()))
        weights = [_like(a, p) for a, p in zip(averages, parts(self._params), strict=True)]
        # AveragedModel's arithmetic; with a count in a tensor, as it has, that would cost more than the average.
        if self._num_averaged:
            torch._foreach_lerp_(averages, weights, self._share(self._num_averaged))
        else:
            torch._foreach_copy_(averages, weights)
        self._num_averaged += 1

    def _check_parameters(self) -> None:
        self._reshard()
        self._known.check()

    def _reshard(self) -> None:
        if self._sharded:
            reshard(self._model)

    def _check_outside(self, what: str) -> None:
        if self._place is not None:
            raise ValueError(INSIDE.format(what=what))


class _Average:
    """The way from the weights to their average, as a displacement: `Place` keeps the weights and brings them back."""

    def __init__(self, averages: list[Tensor], *, shown: bool):
        self._averages = averages
        self._shown = shown  # if not, the weights stay, but are kept all the same: the body may change them
        self.support = list(range(len(averages)))

    def add_to(self, params: Sequence[Tensor], sign: float = 1.0) -> None:
        assert sign == 1.0, "there is no way back without the copy"
        if self._shown:
            torch._foreach_copy_([p.detach() for p in parts(params)], parts(self._averages))


def _can_be_averaged(p: Tensor) -> bool:
    return p.is_floating_point() or p.is_complex()


def _widened(p: Tensor) -> Tensor:
    """A copy of a parameter, in fp32 if it is narrower."""
    return p.detach().float() if p.dtype.itemsize < 4 else p.detach().clone()


def _like(average: Tensor, p: Tensor) -> Tensor:
    """The weight in the precision and on the device of its average; the model may have been moved since."""
    p = p.detach()
    return p if p.dtype == average.dtype and p.device == average.device else p.to(average)
