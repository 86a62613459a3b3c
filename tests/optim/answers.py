"""Driving a rule with gradients that the test has chosen, and watching where it asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.optim.rule import Rule, drive
from flatmin.vectors import Vector

close = torch.testing.assert_close


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def vec(*numbers: float) -> Vector:
    return Vector([f64(*numbers)])


def flat(tensors: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors if t is not None])


def cut(z: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = z.split([t.numel() for t in like])
    return [part.view_as(t) for part, t in zip(parts, like, strict=True)]


def ask(
    rule: Rule, answers: Sequence[Tensor] | Callable[[Tensor], Tensor], at: Sequence[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Drives `rule` from `at` with `answers` (in their order, or a function of the point), all of them one vector.

    Returns:
        Its direction, and the displacements that it asked for. An answer that was not asked for is an error.
    """
    if at is None:
        assert not callable(answers)
        at = [torch.zeros_like(answers[0])]
    waiting, start, places = None if callable(answers) else list(answers), flat(at), []

    def gradient(point: list[Tensor]) -> Vector:
        places.append(flat(point) - start)
        answer = waiting.pop(0) if waiting is not None else answers(flat(point))  # type: ignore[operator]
        return Vector(cut(answer.clone(), at))

    direction = drive(rule, at, gradient)
    assert not waiting, f"{len(waiting)} gradients were not asked for"
    return flat(direction.tensors), places


class Field(nn.Module):
    """The loss z^T H z / 2 + sum z^4 / 8 of six numbers z, a matrix `w` and a vector `b`; gradient H z + z^3 / 2."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(f64(1.0, -2.0, 0.5, 1.5).view(2, 2))
        self.b = nn.Parameter(f64(-1.0, 2.0))
        self.hessian = torch.diag(f64(1.0, 0.5, 2.0, 1.0, 3.0, 0.2)) + 0.3

    def point(self) -> Tensor:
        return flat([self.w, self.b])

    def gradient(self, z: Tensor) -> Tensor:
        return self.hessian @ z + z**3 / 2

    def forward(self) -> Tensor:
        z = torch.cat([self.w.reshape(-1), self.b])
        return z @ self.hessian.to(z) @ z / 2 + (z**4).sum() / 8


def step(optimizer: Any, model: nn.Module, loss: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
    """One step in the loop form: the weights before it, the displacements, and the direction."""
    before, places = flat(model.parameters()), []
    for _ in optimizer.probes():
        places.append(flat(model.parameters()) - before)
        loss().backward()
    direction = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())
    optimizer.step()
    return before, places, direction
