"""The Lanczos iteration with full reorthogonalisation and thick restart.

After m products with a symmetric matrix A the basis q_1 .. q_m and the projection T satisfy

    A Q = Q T + beta q_{m+1} e_m^T

An eigenpair (theta, s) of T gives the Ritz pair (theta, Q s), whose residual |A Q s - theta Q s| is beta |s_m| exactly,
without another product. Each new vector is orthogonalised against all of the basis, twice: without that, converged
eigenvalues come back as ghost copies (Paige 1980).

A restart replaces the basis by some of its Ritz vectors, after which T is diagonal with one full row, and goes on from
the same q_{m+1}: nothing but the other Ritz vectors is forgotten (Wu, Simon 2000).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from flatmin.curvature.products.space import Space, flatten, shaped
from flatmin.vectors import Vector

Product = Callable[[Vector], Vector]
CHUNK = 8  # rows that are allocated together
RECENT = 5  # diagonal entries from which the next one is guessed


class Lanczos:
    """The growing Krylov basis and the projection onto it.

    Args:
        product: v -> A v.
        params: what the vectors are shaped like.
        seed: of random vectors: the start, if none is given, and the way out of an invariant subspace.
        start: flat (see `space`).
        deflated: orthonormal vectors that the iteration stays orthogonal to.
    """

    def __init__(
        self,
        product: Product,
        params: Sequence[Tensor],
        *,
        seed: int = 0,
        start: Tensor | None = None,
        deflated: Rows | None = None,
    ):
        self._product, self._space = product, Space(params)
        self._generator = torch.Generator(params[0].device).manual_seed(seed)
        self._deflated = Rows(self._space) if deflated is None else deflated
        self._basis = Rows(self._space)
        self._t = np.zeros((0, 0))
        self._diagonal: list[float] = []  # q^T A q of every basis vector so far, in the order of the products
        self._coupling = np.zeros(0)  # of q_{m+1} to the basis: beta e_m, after a restart a full row
        self._scale = 0.0
        self._next = self._random() if start is None else self._begin(start.to(self._space.like))
        self.num_products = 0
        self.complete = False  # the basis spans everything

    @property
    def size(self) -> int:
        """The number of basis vectors."""
        return len(self._basis)

    @property
    def floor(self) -> float:
        """Below this an eigenvalue is rounding: machine precision times the largest number seen."""
        return torch.finfo(self._space.like.dtype).eps * self._scale

    @property
    def rounding(self) -> float:
        """What rounding may add to a residual: that of sums over all parameters."""
        return self.floor * math.sqrt(self._space.dim)

    def extend(self) -> None:
        """One product: q_{m+1} joins the basis."""
        q = self._next
        w = self._multiply(q)
        diagonal = self._space.dot(q, w)
        self._t = self._bordered(diagonal)
        self._diagonal.append(diagonal)
        self._basis.append(q)
        w = self._orthogonal(w)
        beta = self._space.norm(w)
        self._scale = max(self._scale, abs(diagonal), float(np.abs(self._coupling).max(initial=0.0)))
        if self.size + len(self._deflated) == self._space.dim:
            beta, self.complete = 0.0, True
        elif beta <= 10 * self.floor:  # an invariant subspace: go on in its complement
            beta, self._next = 0.0, self._random()
        else:
            self._next = w / beta
            self._scale = max(self._scale, beta)
        self._coupling = np.concatenate([np.zeros(self.size - 1), [beta]])

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values in ascending order, their residuals, and their coordinates (size, size), one a column."""
        # By torch, which keeps to its number of threads: numpy's wait by turning, and keep a core from other processes.
        theta, s = (part.numpy() for part in torch.linalg.eigh(torch.from_numpy(self._t)))
        return theta, np.abs(self._coupling @ s), s

    def ahead(self) -> np.ndarray:
        """The Ritz values that one more product would give, ascending, (size + 1,): a guess.

        The next basis vector's coupling to the others is known; its diagonal entry is taken to be the mean of the last
        five. Where the values converge, they are nearer to the eigenvalues than the Ritz values by a factor of about
        ten.
        """
        bordered = self._bordered(float(np.mean(self._diagonal[-RECENT:])))
        return torch.linalg.eigvalsh(torch.from_numpy(bordered)).numpy()

    def vectors(self, coordinates: np.ndarray) -> Rows:
        """The Ritz vectors with these coordinates (size, k), as rows."""
        return self._basis.combined(coordinates)

    def vector(self, coordinates: np.ndarray) -> Tensor:
        """The one Ritz vector with these coordinates (size,), flat, without a chunk of rows for it."""
        return self._basis.mixed(coordinates)

    def restart(self, theta: np.ndarray, coordinates: np.ndarray) -> None:
        """Replaces the basis by the Ritz vectors with these values and coordinates."""
        self._coupling = self._coupling @ coordinates
        self._basis = self.vectors(coordinates)
        self._t = np.diag(theta)

    def _bordered(self, diagonal: float) -> np.ndarray:
        """The projection with one more row."""
        return np.block([[self._t, self._coupling[:, None]], [self._coupling[None, :], np.array([[diagonal]])]])

    def _multiply(self, q: Tensor) -> Tensor:
        self.num_products += 1
        return flatten(self._product(shaped(q, self._space.params))).to(q.dtype)

    def _orthogonal(self, w: Tensor) -> Tensor:
        for _ in range(2):  # twice is enough (Kahan)
            w = self._deflated.reject(self._basis.reject(w))
        return w

    def _begin(self, start: Tensor) -> Tensor:
        left = self._orthogonal(start)
        size = self._space.norm(left)
        return left / size if size > 1e-6 * self._space.norm(start) else self._random()

    def _random(self) -> Tensor:
        w = self._orthogonal(self._space.random(self._generator))
        return w / self._space.norm(w)


class Rows:
    """Orthonormal vectors, the rows of a matrix that grows."""

    def __init__(self, space: Space):
        self._space, self._like = space, space.like
        self._chunks: list[Tensor] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, row: Tensor) -> None:
        """One more row, which must be orthogonal to the others."""
        place = self._size % CHUNK
        if place == 0:
            self._chunks.append(self._like.new_empty(CHUNK, self._like.numel()))
        self._chunks[-1][place] = row
        self._size += 1

    def reject(self, w: Tensor) -> Tensor:
        """The part of w that is orthogonal to all rows."""
        for chunk in self._filled():
            w = w - chunk.T @ self._space.summed(chunk @ w)
        return w

    def row(self, i: int) -> Tensor:
        """One of the rows."""
        return self._chunks[i // CHUNK][i % CHUNK]

    def combined(self, coordinates: np.ndarray) -> Rows:
        """New rows: sum_i coordinates[i, j] row_i for each j."""
        new = Rows(self._space)
        mix = torch.from_numpy(coordinates.T.copy()).to(self._like)
        for first in range(0, len(mix), CHUNK):
            part = mix[first : first + CHUNK]
            block = self._like.new_zeros(CHUNK, self._like.numel())
            for i, chunk in enumerate(self._filled()):
                block[: len(part)] += part[:, i * CHUNK : i * CHUNK + len(chunk)] @ chunk
            new._chunks.append(block)
        new._size = len(mix)
        return new

    def mixed(self, coordinates: np.ndarray) -> Tensor:
        """sum_i coordinates[i] row_i."""
        mix = torch.from_numpy(coordinates.copy()).to(self._like)
        total = torch.zeros_like(self._like)
        for i, chunk in enumerate(self._filled()):
            total += chunk.T @ mix[i * CHUNK : i * CHUNK + len(chunk)]
        return total

    def _filled(self) -> list[Tensor]:
        return [c[: min(CHUNK, self._size - i * CHUNK)] for i, c in enumerate(self._chunks)]
