"""bSAM: SAM as variational inference, with a precision for every weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from torch.optim import SGD, Optimizer

from flatmin.checks import check_number, check_positive, check_share, check_whole
from flatmin.notices import warn
from flatmin.optim.engine.optimizer import FlatOptimizer
from flatmin.optim.options import EngineOptions
from flatmin.optim.registry import register
from flatmin.optim.rule import Rule
from flatmin.radii import Radii
from flatmin.vectors import Vector


def bsam(
    rho: Radii,
    weights: Vector,
    draw: Vector,
    memory,
    *,
    num_data: int,
    prior: float,
    damping: float,
    betas: tuple[float, float],
    initial: float,
) -> Rule:
    """Theta = W + n / sqrt(N s); e = rho g(theta) / s; m <- b1 m + (1 - b1)(g(W + e) + delta W); G = m / s.

    Afterwards s <- b2 s + (1 - b2)(sqrt(s) |g(theta)| + delta + damping). delta = prior / N.
    """
    delta, (b1, b2) = prior / num_data, betas
    s, m = _filled(memory.get("precision"), draw, initial), memory.get("momentum")
    noise = Vector(None if n is None or q is None else n * (num_data * q).rsqrt() for n, q in _pairs(draw, s))
    g = yield noise
    del noise
    e = rho * Vector(None if t is None or q is None else t / q for t, q in _pairs(g, s))
    perturbed = yield e
    del e
    inner = perturbed + Vector(None if t is None else w for t, w in _pairs(perturbed, weights)) * delta
    m = inner * (1.0 - b1) if m is None else m * b1 + inner * (1.0 - b1)
    memory["momentum"] = m
    moved = s.within(draw)
    grown = Vector(
        q if t is None or q is None else b2 * q + (1.0 - b2) * (q.sqrt() * t.abs() + delta + damping)
        for t, q in _pairs(g, moved)
    )
    memory["precision"] = Vector(old if new is None else new for old, new in _pairs(s, grown))
    return Vector(
        t if p is None or q is None else p / q
        for t, p, q in zip(perturbed.tensors, m.tensors, moved.tensors, strict=True)
    )


def _filled(s: Vector | None, draw: Vector, initial: float) -> Vector:
    """The precision so far, and the first value where there is none yet: a layer may join later, or pause."""
    if s is None:
        s = Vector([None] * len(draw))
    return Vector(n.new_full(n.shape, initial) if q is None and n is not None else q for n, q in _pairs(draw, s))


def _pairs(a: Vector, b: Vector):
    return zip(a.tensors, b.tensors, strict=True)


@register("bsam", gradients=2, paper="Moellenhoff, Khan 2023, arXiv:2210.01620", needs=("num_data",))
class BSAM(FlatOptimizer):
    """bSAM around plain SGD: an Adam-like method that learns a Gaussian over the weights.

    State: mean W, momentum m, precision s. With N the number of training samples, delta = prior / N and n ~ N(0, I):

        g  = gradient at W + n / sqrt(N s)
        g' = gradient at W + rho g / s                         (entry by entry, not normalised)
        m <- b1 m + (1 - b1) (g' + delta W)
        W <- W - lr m / s                                      (the old s)
        s <- b2 s + (1 - b2) (sqrt(s) |g| + delta + damping)

    without bias correction. The rule hands m / s to the base optimizer, which should be SGD without momentum.

    Args:
        base: `torch.optim.SGD(params, lr)`, without momentum and weight decay: m and delta are theirs.
        rho: of the ascent; a group option; 0.01 in the published CIFAR runs.
        num_data: N, the number of training samples.
        prior: precision of the prior; 40 in the published CIFAR runs.
        damping: added to s's update.
        betas: b1 and b2.
        initial: first value of s.
        seed: of n; `None` is really random.
        options: see `flatmin.optim.options.EngineOptions`.

    Cost: two gradients a step. Memory inside a step: seven copies of the parameters; two between steps and in
    checkpoints: m and s. `step(closure)` returns the mean loss over its two points.

    Raises:
        ValueError: negative `rho`, `prior` or `damping`, `num_data` < 1, `betas` outside [0, 1], `initial` <= 0.

    Source: Moellenhoff, Khan, "SAM as an Optimal Relaxation of Bayes", ICLR 2023, and its published JAX code, which
    also averages over 8 sub-batches with noise of their own (here: one, or a loop of `probes(share=1 / 8)` for each).
    Learning rate there 0.5.
    """

    radius_name = "rho"
    takes_sparse = False
    remembers = ("momentum", "precision")
    replaces_momentum = True
    is_random = True

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.01,
        *,
        num_data: int,
        prior: float = 40.0,
        damping: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        initial: float = 1.0,
        seed: int | None = 0,
        **options: Unpack[EngineOptions],
    ):
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1], got {betas!r}.")
        for i, beta in enumerate(betas):
            check_share(f"betas[{i}]", beta)
        check_positive("initial, the first precision of every weight,", initial)
        self.num_data = check_whole("num_data, the number of training samples,", num_data, 1)
        self.prior, self.damping = check_number("prior", prior, 0.0), check_number("damping", damping, 0.0)
        self.betas, self.initial = betas, initial
        super().__init__(base, rho, seed=seed, **options)
        if not isinstance(base, SGD) or any(g.get("momentum") or g.get("weight_decay") for g in base.param_groups):
            warn(
                "BSAM has a momentum, a preconditioner and a prior of its own: its base should be SGD without momentum "
                "and weight decay.",
            )

    def rule(self) -> Rule:
        """See `bsam`."""
        rho = self.radii()
        unit = self.noise("normal", rho.ones).vector()
        return bsam(
            rho,
            self.weights(),
            unit,
            self.memory,
            num_data=self.num_data,
            prior=self.prior,
            damping=self.damping,
            betas=self.betas,
            initial=self.initial,
        )

    @property
    def gradients_per_step(self) -> int:
        """Two."""
        return 2
