"""SAM and NSO as functions of their own: all that a step owes its caller, for one method, one process and one group.

Weights return exactly, also after an exception; the second pass sees the random state of the first and leaves buffers
alone; a loss or direction that is not finite skips the step; noise is a function of seed and step; nothing is kept
between steps. No engine, no hooks, no forms, no wrapper around the base's step: the price of the method alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatmin.noise import mix_seeds
from flatmin.optim.engine import unobserved

Closure = Callable[[], Tensor]
RHO, SIGMA = 0.05, 0.01


class Special:
    """What both have in common; `closure` evaluates, and clears gradients by `clear`."""

    def __init__(self, model: nn.Module, base: Optimizer):
        self.model, self.base = model, base
        self.params = list(model.parameters())
        self.generator = torch.Generator()
        self.num_steps = 0

    def clear(self) -> None:
        """Clears the gradients."""
        for p in self.params:
            p.grad = None

    def sam(self, closure: Closure) -> Tensor:
        """g(W + rho g / |g|)."""
        before = torch.default_generator.get_state()
        loss = closure()
        value, after = loss.item(), torch.default_generator.get_state()
        grads = self._gradients()
        size = math.hypot(*[torch.linalg.vector_norm(g).item() for g in grads])
        scale = RHO / size if math.isfinite(size) and size > 0 else 0.0
        with self._away() as (weights, _), self._quiet(before, after):
            torch._foreach_add_(weights, grads, alpha=scale)
            del grads
            second = closure().item()
        self._finish(value + second)
        return loss

    def nso(self, closure: Closure) -> float:
        """[g(W + U) + g(W - U)] / 2."""
        before = torch.default_generator.get_state()
        noise = self._noise()
        with self._away() as (weights, saved):
            torch._foreach_add_(weights, noise)
            first = closure().item()
            after = torch.default_generator.get_state()
            grads = self._gradients()
            for w, s, u in zip(weights, saved, noise, strict=True):
                torch.sub(s, u, out=w)
            with self._quiet(before, after):
                second = closure().item()
        both = self._gradients()
        torch._foreach_add_(both, grads)
        torch._foreach_mul_(both, 0.5)
        self._finish(first + second)
        return (first + second) / 2

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.params if p.grad is not None]

    def _noise(self) -> list[Tensor]:
        generator = self.generator.manual_seed(mix_seeds(mix_seeds(0, self.num_steps, 0)))
        self.num_steps += 1
        sizes = [p.numel() for p in self.params]
        parts = torch.empty(sum(sizes)).normal_(0.0, SIGMA, generator=generator).split(sizes)
        return [part.view_as(p) for part, p in zip(parts, self.params, strict=True)]

    @contextmanager
    def _away(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        weights = [p.detach() for p in self.params]
        saved = [w.clone() for w in weights]
        try:
            yield weights, saved
        finally:
            torch._foreach_copy_(weights, saved)

    @contextmanager
    def _quiet(self, before: Tensor, after: Tensor) -> Iterator[None]:
        buffers = list(self.model.buffers())
        copies = [b.clone() for b in buffers]
        torch.default_generator.set_state(before)
        try:
            yield
        finally:
            torch.default_generator.set_state(after)
            for b, copy in zip(buffers, copies, strict=True):
                b.copy_(copy)

    def _finish(self, loss: float) -> None:
        found = torch.zeros(1)
        torch._amp_foreach_non_finite_check_and_unscale_(self._gradients(), found, torch.ones(1))
        if math.isfinite(loss) and not found.item():
            unobserved.step(self.base)
