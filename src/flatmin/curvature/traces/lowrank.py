"""Hutch++ and XTrace: a part of the trace exactly, on a subspace that holds most of it; probes for the rest.

With Q an orthonormal basis of the range of H S for random vectors S, and P = I - Q Q',

    tr H = tr Q' H Q + tr P H P        Hutch++: the first exactly, the second by probes, a fresh one for every batch
    tr H = mean of t_i                 XTrace: t_i uses all test vectors but the i-th for Q, and the i-th as the probe

Both need products over the whole data (one vector for all batches) and hold about three copies of the parameters for
each test vector. They pay where few eigenvalues carry the trace and a small error is wanted.

Source: Meyer, Musco, Musco and Woodruff 2021; Epperly, Tropp and Webber 2024.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from flatmin.curvature.products.operators import Operator
from flatmin.curvature.products.probes import Budget, VectorProbes, run
from flatmin.curvature.products.space import Space, flatten, shaped
from flatmin.curvature.traces.found import Found
from flatmin.noise import draw_like, mix_seeds
from flatmin.vectors import Vector

START = 8  # test vectors to begin with
FIRST = 16  # probes of the rest before the first decision: what a subspace leaves varies unevenly
# The leave-one-out estimates share most of their test vectors, so their spread understates the error of their mean: by
# up to 1.4 for 12 vectors on the nets of the tests, by less for more. They are spread out by that.
CORRELATION = 1.4


def fits(operator: Operator, memory: int) -> bool:
    """Whether there are products, and 64 test vectors and what belongs to them fit into so many bytes; never shards."""
    if operator.objective.sharded or operator.way.name == "loss":
        return False
    return 4 * 64 * sum(p.numel() * p.element_size() for p in operator.objective.params) <= memory


class _Basis:
    """Test vectors W, their products Y = H W, an orthonormal basis Q of Y's range, and Z = H Q; flat, by columns."""

    def __init__(self, operator: Operator, seed: int):
        self._operator, self._params = operator, operator.objective.params
        self._generator = torch.Generator(self._params[0].device).manual_seed(mix_seeds(seed, 3))
        self._sizes = [p.numel() for p in self._params]
        like = Space(self._params).like  # fp32 or wider: there is no decomposition in half precision
        self.w = self.y = self.q = self.z = like.new_empty(operator.num_params, 0)

    @property
    def num_products(self) -> int:
        """Products so far."""
        return self.w.shape[1] + self.q.shape[1]

    @property
    def full(self) -> bool:
        """Whether Q holds the whole range of H, to rounding: then Q' H Q has the whole trace."""
        return self.q.shape[1] < self.w.shape[1] or self.q.shape[1] == self.q.shape[0]

    def extend(self, number: int) -> None:
        """`number` more test vectors (not more than parameters), and twice as many products."""
        number = min(number, self.w.shape[0] - self.w.shape[1])
        new = draw_like(self.w.new_empty(self.w.shape[0], number), "rademacher", self._generator)
        self.w = torch.cat([self.w, new], 1)
        self.y = torch.cat([self.y, self._products(new)], 1)
        added = new_directions(self.q, self.y[:, -number:])
        self.q, self.z = torch.cat([self.q, added], 1), torch.cat([self.z, self._products(added)], 1)

    def project(self, v: list[Tensor]) -> list[Tensor]:
        """P v."""
        flat = flatten(Vector(v)).to(self.q.dtype)
        return shaped(flat - self.q @ (self.q.T @ flat), self._params).present

    def by_param(self, a: Tensor, b: Tensor) -> np.ndarray:
        """The inner product of the columns of `a` and `b` for each parameter: (columns, parameters)."""
        products = (a * b).double().split(self._sizes)
        return torch.stack([part.sum(0) for part in products], 1).cpu().numpy()

    def _products(self, columns: Tensor) -> Tensor:
        found = []
        for column in columns.T:
            product = self._operator.product(shaped(column.contiguous(), self._params))
            found.append(flatten(product).to(columns.dtype))
        return torch.stack(found, 1) if found else columns


def new_directions(q: Tensor, y: Tensor) -> Tensor:
    """An orthonormal basis of the range of `y` outside of that of `q`, without directions that are rounding."""
    scale = torch.linalg.vector_norm(y)
    for _ in range(2):  # twice is enough
        y = y - q @ (q.T @ y)
    u, sizes, _ = torch.linalg.svd(y, full_matrices=False)
    u = u[:, sizes > 100 * torch.finfo(y.dtype).eps * scale]
    return u - q @ (q.T @ u)


def hutch_plus_plus(
    operator: Operator, budget: Budget, seed: int, *, known: float = 0.0, variance: float = math.inf
) -> Found:
    """The trace of `operator` by Hutch++.

    The test vectors are doubled as long as the probes that are still needed cost more than that. If the first few do
    not halve the `variance` that probes have without them, the result has no samples: it did not pay.

    Args:
        operator: the matrix.
        budget: what may be spent; the error asked for is relative to the trace and `known` together.
        seed: of the vectors.
        known: what is added to the trace.
        variance: of probes of the operator as it is, if that is known.
    """
    basis = _Basis(operator, seed)
    total = budget.max_products
    doubles = budget.rtol is not None or variance < math.inf or budget.max_seconds is not None
    size = START if doubles else max(total // 3, 1)
    drawn = 0  # for subspaces that were too small
    while True:
        basis.extend(max(min(size, (total - basis.num_products - drawn - START) // 2), 1))
        size = basis.w.shape[1]
        constant = basis.by_param(basis.q, basis.z).sum(0)
        budget.max_products = max(total - basis.num_products - drawn, 2)
        draw = VectorProbes(operator, mix_seeds(seed, size), basis.project).draw
        samples = draw(0, min(FIRST, budget.max_products)).cpu().numpy()
        left = budget.left(samples.sum(1), known + constant.sum())
        if size <= START and not basis.full and samples.sum(1).var(ddof=1) > variance / 2:
            budget.spend(len(samples))
            drawn, samples, constant = drawn + len(samples), samples[:0], 0 * constant
            break
        # The next round takes four products for each test vector there is; half of the time goes to the rest.
        if basis.full or left <= 4 * size or 4 * size + START > budget.max_products:
            break
        if budget.used(basis.num_products + drawn, 6 * size) > 1 / 2:
            break
        drawn += len(samples)
    if len(samples) and not basis.full:
        samples = run(draw, budget, samples, known + float(constant.sum()))
    num_products = basis.num_products + drawn + len(samples)
    return Found(
        method=f"Hutch++ with {basis.q.shape[1]} directions and fresh probes for every batch",
        constant=constant,
        samples=samples,
        num_products=num_products,
        num_gradients=num_products * operator.cost,
    )


def xtrace(operator: Operator, budget: Budget, seed: int) -> Found:
    """The trace of `operator` by XTrace. Test vectors are doubled until the error is small enough."""
    basis = _Basis(operator, seed)
    total = budget.max_products
    size = START if budget.rtol is not None or budget.max_seconds is not None else max(total // 2, 2)
    while True:
        basis.extend(max(min(size, (total - basis.num_products) // 2), 2))
        size = basis.w.shape[1]
        samples = _leave_one_out(basis)
        if basis.full or basis.num_products + 4 > total or (budget.rtol is not None and budget.met(samples.sum(1))):
            break
        if budget.used(basis.num_products, 2 * size) > 1:
            break
    return Found(
        method=f"XTrace with {size} test vectors",
        constant=np.zeros(samples.shape[1]),
        samples=samples,
        num_products=basis.num_products,
        num_gradients=basis.num_products * operator.cost,
    )


def _leave_one_out(basis: _Basis) -> np.ndarray:
    """The estimates t_i, for each parameter: (test vectors, parameters)."""
    q, z, w, y = (t.double() for t in (basis.q, basis.z, basis.w, basis.y))
    known = basis.by_param(q, z).sum(0)
    if basis.full:
        return np.tile(known, (w.shape[1], 1))
    # Without column i, the range of Y = Q R is that of Q without the direction s_i, R' s_i ~ e_i.
    s = torch.linalg.inv(q.T @ y).T
    s = s / torch.linalg.vector_norm(s, dim=0)
    inside = q.T @ w
    along = (s * inside).sum(0)
    rest = w - q @ inside + (q @ s) * along
    product = y - z @ inside + (z @ s) * along
    found = known - basis.by_param(q @ s, z @ s) + basis.by_param(rest, product)
    return found.mean(0) + CORRELATION * (found - found.mean(0))
