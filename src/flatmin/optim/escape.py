"""Escaping sharp minima: randomly smoothed and sharpness-aware perturbation (RSP, SAP)."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Unpack

from torch.optim import Optimizer

from flatmin.checks import check_whole
from flatmin.optim.engine.optimizer import FlatOptimizer
from flatmin.optim.options import EngineOptions
from flatmin.optim.parts import some
from flatmin.optim.registry import register
from flatmin.optim.rule import HERE, Probe, Rule
from flatmin.radii import Radii
from flatmin.shards import any_sharded
from flatmin.vectors import Vector

SHARDED = (
    "SAP looks where one sample points. The parameters are sharded (FSDP2), so all processes look at one place, and "
    "the samples of all would be averaged, which weakens its effect. Use DistributedDataParallel, or RSP."
)


def rsp(rho: Radii, draw: Callable[[], Vector], threshold: float) -> Rule:
    """G = g + P g(W + rho u) if |g| <= threshold, else g; u uniform on the sphere, P projects g out. Two gradients."""
    g = yield HERE
    if _large(g, threshold):
        return g
    v = yield rho.along(draw())
    return _with_rest(g, v)


def sap(rho: Radii, threshold: float, seed: int, num_samples: int, nudge: Any) -> Rule:
    """G = g + P g_i(W + rho s g_i / |g_i|) if |g| <= threshold, else g; i a random sample, s a random sign."""
    g = yield HERE
    if _large(g, threshold):
        return g
    sample = some(num_samples, seed)
    own = yield Probe(part=sample, ascent=True)
    if float(own.norm()) == 0.0:  # remark 2 of the paper: look beside the point
        own = yield Probe(nudge, part=sample, ascent=True)
    e = rho.ascent(own)
    del own
    v = yield Probe(e if seed % 2 else -e, part=sample)
    return _with_rest(g, v)


def _with_rest(g: Vector, v: Vector) -> Vector:
    """G and the part of v orthogonal to it, in v's memory."""
    share = (v.dot(g) / g.dot(g)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return v.add_(g * (1.0 - share))


def _large(g: Vector, threshold: float) -> bool:
    return threshold < math.inf and float(g.norm()) > threshold


class _Escape(FlatOptimizer):
    radius_name = "rho"
    is_random = True

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.05,
        threshold: float = math.inf,
        seed: int | None = 0,
        **options: Unpack[EngineOptions],
    ):
        if not isinstance(threshold, Real) or isinstance(threshold, bool) or not threshold > 0:
            raise ValueError(
                f"threshold must be positive (math.inf perturbs at every step), got {threshold!r}. It is the gradient "
                "norm up to which the method perturbs."
            )
        self.threshold = float(threshold)
        super().__init__(base, rho, seed=seed, **options)


@register("rsp", gradients=2, paper="Ahn, Jadbabaie, Sra 2024, arXiv:2305.15659, algorithm 1")
class RSP(_Escape):
    """Randomly smoothed perturbation around any base optimizer.

    Near the minima, where `|g| <= threshold`, it adds the gradient at a random point of the sphere of radius rho, with
    its component along g projected out:

        G = g + (I - g g^T / |g|^2) g(W + rho u),    u uniform on the unit sphere.

    As E u u^T = I / d, the second term is in expectation, to leading order, rho^2 / 2 times the gradient of
    `tr(Hessian) / d` less its component along g. The part of it along the minima makes the iterate drift to flat ones;
    the part across them is balanced by g, which keeps it there. Elsewhere G = g.

    Args:
        base: an optimizer instance. The paper's is gradient descent; its step size in the two branches is the base's
            learning rate.
        rho: radius of the sphere, in the units of the weights; a group option (the direction is uniform on the
            sphere of the moved parameters, and each entry is scaled by its group's radius).
        threshold: gradient norm up to which it perturbs. The default `math.inf` always does: with mini-batches the
            norm never gets small, and the choice costs a host synchronisation.
        seed: of the directions; `None` is really random.
        options: see `flatmin.optim.options.EngineOptions`.

    Cost: two gradients a step (one where it does not perturb). Memory inside a step: three copies of the parameters.
    `step(closure)` returns the loss at the unperturbed weights. The theory is for full gradients; with mini-batches
    it is a heuristic. The paper returns a random iterate, a device of its analysis; this keeps the last.

    Raises:
        ValueError: negative `rho`, `threshold` <= 0.

    Source: Ahn, Jadbabaie, Sra, "How to Escape Sharp Minima with Random Perturbations", ICML 2024, algorithm 1. The
    branch condition and v being added to g follow section 2 of the paper.
    """

    def rule(self) -> Rule:
        """See `rsp`."""
        return rsp(self.radii(), lambda: self.noise("normal", self.radii().ones).vector(), self.threshold)

    @property
    def gradients_per_step(self) -> int:
        """Two."""
        return 2


@register("sap", gradients=3, paper="Ahn, Jadbabaie, Sra 2024, arXiv:2305.15659, algorithm 2")
class SAP(_Escape):
    """Sharpness-aware perturbation around any base optimizer.

    RSP with a direction that one sample gives instead of chance:

        G = g + (I - g g^T / |g|^2) g_i(W + rho s g_i / |g_i|),    i a random sample, s a random sign.

    With one output, near interpolation, the Hessian of one sample is of rank one along g_i, so that direction sees all
    of its trace: about d times the drift of RSP (with C classes the rank is C - 1, and g_i sees a part of it). The more
    samples g_i is taken over, the smaller the effect; with the full gradient there is none.

    Args:
        base: an optimizer instance.
        rho: radius, in the units of the weights; a group option.
        threshold: gradient norm up to which it perturbs; `math.inf` (default) always does.
        seed: of the samples and signs; `None` is really random.
        num_samples: samples that g_i is taken over. The paper's analysis has 1; in its experiments 128 still escape
            sooner than RSP, and 1 is quite effective. Batch norm in training mode needs at least 2.
        options: see `flatmin.optim.options.EngineOptions`.

    With several processes g is averaged over them, and each takes samples of its own: the directions are averaged, not
    the g_i. Under FSDP2 all look at one place, so that is impossible.

    Needs `x, y = probe.take(x, y)` in the loop (`opt.take` in a closure), which gives the sample where it is due.

    Cost: three passes a step: one gradient of the batch and two of one sample. Memory inside a step: four copies of
    the parameters. `step(closure)` returns the loss of the batch at the unperturbed weights.

    Raises:
        ValueError: negative `rho`, `threshold` <= 0, `num_samples` < 1, a body that does not call `take`, sharded
            parameters.

    Source: Ahn, Jadbabaie, Sra, ICML 2024, algorithm 2 and remark 2 (where g_i vanishes exactly, a tiny random step
    is taken first). Unlike SAM it keeps g, draws a sign and projects.
    """

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.05,
        threshold: float = math.inf,
        seed: int | None = 0,
        *,
        num_samples: int = 1,
        **options: Unpack[EngineOptions],
    ):
        self.num_samples = check_whole("num_samples", num_samples, 1)
        super().__init__(base, rho, threshold, seed, **options)

    sync_ascent = False

    @property
    def needs_take(self) -> bool:
        """Yes: its samples."""
        return True

    def rule(self) -> Rule:
        """See `sap`."""
        if any_sharded(self.params):
            raise ValueError(SHARDED)
        nudge = self.noise("normal", Radii(1e-4 * r for r in self.radii().values))
        return sap(self.radii(), self.threshold, self.new_seed(), self.num_samples, nudge)

    @property
    def gradients_per_step(self) -> int:
        """Three passes, two of them over one sample."""
        return 3
