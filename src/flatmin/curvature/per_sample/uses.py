"""The operations that take a parameter directly, and the gradient of a single sample through each of them.

For an operation with output z and delta = d(something) / dz, given for each sample n, the gradient by its parameter is

    linear           sum_t delta_nt a_nt'           t: positions within a sample
    convolution      the same, with the patches of the input as a
    normalisation    sum_t delta_nt x_nt            x: the normalised input
    addition, bias   sum_t delta_nt
    multiplication   sum_t delta_nt y_nt            y: the other factor
    embedding        sum_t delta_nt, at row index_nt
    lookup           the same with index_t, of what is looked up once and added for every sample

All deltas come as (classes, samples, ...): several at once. Only |gradient|^2 is wanted, for which the gradient need
not always be formed: |sum_t delta_t a_t'|^2 = sum_st (delta_s . delta_t) (a_s . a_t).

The other way, a change V_n of the parameter changes z by e_n, linearly: e_nt = V_n a_nt for a linear layer, and the
adjoint of the gradient above for any. A `perturbation` is such an e for random V_n, different ones for each sample.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property, wraps
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flatmin.curvature.per_sample.outer import outer, outer_norms, root, squared
from flatmin.curvature.products.graph import Node, first_line
from flatmin.noise import draw_like

Given = ParamSpec("Given")
Result = TypeVar("Result")
PATCHES = 2**19  # numbers that the patches of a convolution may have, at a time: more fall out of the caches
Layout = str  # of the rows of a delta: "first", sample by sample, or "second", position by position


class Use(ABC):
    """One use of parameter `param` by the operation `node`."""

    any_layout = True  # otherwise the samples are along the first dimension

    def __init__(self, param: int, node: Node):
        self.param, self.node = param, node
        self.layout: Layout = "first"
        self.samples = 0
        self.shape: tuple[int, ...] = ()  # of the parameter

    def norms(self, delta: Tensor) -> Tensor:
        """|gradient|^2 for each class and sample: (classes, samples)."""
        return squared(self.gradients(delta).flatten(2))

    def norms_alone(self, delta: Tensor, sample: int) -> Tensor:
        """The same where `delta` is zero for all samples but one."""
        return self.norms(delta)

    @abstractmethod
    def gradients(self, delta: Tensor) -> Tensor:
        """The gradient for each class and sample: (classes, samples, *parameter)."""

    def changes(self, v: Tensor, like: Tensor) -> Tensor:
        """How the operation's output changes with the parameter, by `v` (samples, *parameter): of the shape of `like`.

        The adjoint of `gradients`.
        """
        with torch.enable_grad():
            delta = torch.zeros_like(like, requires_grad=True)
            return torch.autograd.grad(self.gradients(delta.unsqueeze(0))[0], delta, v)[0]

    def perturbation(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """The change with random signs v, fresh for every sample, or another random vector of the same covariance."""
        signs = draw_like(like.new_empty(self.samples, *self.shape), "rademacher", generator)
        return self.changes(signs, like)

    def rows(self, tensor: Tensor, leading: int = 0) -> Tensor:
        """`tensor` (..., features), after `leading` dimensions, as (samples, positions, features)."""
        lead, features = tensor.shape[:leading], tensor.shape[-1]
        if self.layout == "first":
            return tensor.reshape(*lead, self.samples, -1, features)
        return tensor.reshape(*lead, -1, self.samples, features).transpose(leading, leading + 1)

    def placed(self, rows: Tensor, like: Tensor) -> Tensor:
        """(samples, positions, features) where `like` has them: the inverse of `rows`."""
        return (rows if self.layout == "first" else rows.transpose(0, 1)).reshape(like.shape)


class LinearUse(Use):
    """The weight of x W' (rows x features), or of x W."""

    def __init__(self, param: int, node: Node, inputs: Tensor, transposed: bool):
        super().__init__(param, node)
        self._inputs, self._transposed = inputs, transposed

    def norms(self, delta: Tensor) -> Tensor:
        """|gradient|^2 for each class and sample."""
        return outer_norms(self.rows(delta, 1), self._rows)

    def gradients(self, delta: Tensor) -> Tensor:
        """The gradient for each class and sample."""
        found = outer(self.rows(delta, 1), self._rows)
        return found if self._transposed else found.transpose(2, 3)

    def perturbation(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """The change with random signs in place of the inputs' directions."""
        return self.placed(self._root @ _signs(self._root, like.shape[-1], generator), like)

    def changes(self, v: Tensor, like: Tensor) -> Tensor:
        """How the operation's output changes."""
        return self.placed(self._rows @ (v.transpose(1, 2) if self._transposed else v), like)

    @property
    def _rows(self) -> Tensor:
        return self.rows(self._inputs)

    @cached_property
    def _root(self) -> Tensor:
        return root(self._rows.detach())


class ConvolutionUse(Use):
    """The weight of a convolution in one or two dimensions, with groups."""

    any_layout = False

    def __init__(self, param: int, node: Node):
        super().__init__(param, node)
        self._shape = tuple(node._saved_weight.shape)
        self._inputs, self._groups = node._saved_input, node._saved_groups
        self._options: dict[str, tuple[int, ...]] = {
            name: tuple(getattr(node, f"_saved_{name}")) for name in ("dilation", "padding", "stride")
        }

    def norms(self, delta: Tensor) -> Tensor:
        """|gradient|^2 for each class and sample."""
        return torch.cat([self._block_norms(delta, block) for block in self._blocks(delta[0])], 1)

    def norms_alone(self, delta: Tensor, sample: int) -> Tensor:
        """The patches of the others are not needed."""
        if delta[:, :sample].any() or delta[:, sample + 1 :].any():
            return self.norms(delta)
        found = torch.zeros(delta.shape[:2], dtype=torch.float64, device=delta.device)
        found[:, sample : sample + 1] = self._block_norms(delta, slice(sample, sample + 1))
        return found

    def gradients(self, delta: Tensor) -> Tensor:
        """The gradient for each class and sample."""
        found = torch.cat([outer(d, a) for d, a in self._by_group(delta, slice(None))], 2)
        return found.reshape(*delta.shape[:2], *self._shape)

    def perturbation(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """The change with random signs; in place of the patches' directions where these are many."""

        def change(a: Tensor, block: slice, group: int) -> Tensor:
            a = root(a) if 4 * a.shape[1] < a.shape[2] else a
            return a @ _signs(a, self._shape[0] // self._groups, generator)

        return self._by_block(like, change)

    def changes(self, v: Tensor, like: Tensor) -> Tensor:
        """How the operation's output changes."""
        weights = [part.flatten(2).transpose(1, 2) for part in v.chunk(self._groups, 1)]
        return self._by_block(like, lambda a, block, group: a @ weights[group][block])

    def _by_block(self, like: Tensor, change: Callable[[Tensor, slice, int], Tensor]) -> Tensor:
        """The `change` (samples, positions, outputs) from the patches of each block of samples and each group."""
        parts = []
        for block in self._blocks(like):
            groups = enumerate(self._by_group(like.unsqueeze(0), block))
            parts.append(torch.cat([change(a, block, group).transpose(1, 2) for group, (_, a) in groups], 1))
        return torch.cat(parts).reshape(like.shape)

    def _blocks(self, like: Tensor) -> list[slice]:
        """Blocks of samples whose patches, and weights of their own, are not too many."""
        most = max(like[0, 0].numel() * self._groups, self._shape[0])
        size = max(PATCHES // max(math.prod(self._shape[1:]) * most, 1), 1)
        return [slice(start, start + size) for start in range(0, self.samples, size)]

    def _block_norms(self, delta: Tensor, block: slice) -> Tensor:
        return torch.stack([outer_norms(d, a) for d, a in self._by_group(delta, block)]).sum(0)

    def _by_group(self, delta: Tensor, block: slice) -> list[tuple[Tensor, Tensor]]:
        """For each group, delta (classes, samples, positions, outputs) and patches (samples, positions, inputs)."""
        patches = self._unfold(self._inputs[block]).chunk(self._groups, 1)
        deltas = delta[:, block].flatten(3).chunk(self._groups, 2)
        return [(d.transpose(2, 3), a.transpose(1, 2)) for d, a in zip(deltas, patches, strict=True)]

    def _unfold(self, x: Tensor) -> Tensor:
        kernel, options = tuple(self._shape[2:]), self._options
        if len(kernel) == 1:
            x, kernel = x.unsqueeze(2), (1, *kernel)
            options = {name: (0 if name == "padding" else 1, *value) for name, value in options.items()}
        return F.unfold(x, kernel, **options)


class SumUse(Use):
    """A parameter of shape `features` (one dimension) that multiplies `factor` (or 1) in every row, or is added."""

    def __init__(self, param: int, node: Node, factor: Tensor | None):
        super().__init__(param, node)
        self._factor = factor

    def gradients(self, delta: Tensor) -> Tensor:
        """The gradient for each class and sample."""
        return self.rows(delta if self._factor is None else delta * self._factor, 1).sum(2)

    def changes(self, v: Tensor, like: Tensor) -> Tensor:
        """How the operation's output changes."""
        change = self.placed(v.unsqueeze(1).expand_as(self.rows(like)), like)
        return change if self._factor is None else change * self._factor


class ChannelUse(Use):
    """As `SumUse`, with the parameter along dimension 1 (channels) of (samples, channels, ...)."""

    any_layout = False

    def __init__(self, param: int, node: Node, factor: Tensor | None):
        super().__init__(param, node)
        self._factor = factor

    def gradients(self, delta: Tensor) -> Tensor:
        """The gradient for each class and sample."""
        terms = delta if self._factor is None else delta * self._factor
        return terms.flatten(3).sum(3) if terms.ndim > 3 else terms


class BroadcastUse(Use):
    """A parameter of any shape that is broadcast over samples, added to or multiplied with something."""

    any_layout = False

    def __init__(self, param: int, node: Node, shape: torch.Size, factor: Tensor | float):
        super().__init__(param, node)
        self._shape, self._factor = shape, factor

    def gradients(self, delta: Tensor) -> Tensor:
        """The gradient for each class and sample."""
        terms = delta * self._factor
        shape = (1,) * (terms.ndim - 1 - len(self._shape)) + tuple(self._shape)
        if shape[0] != 1:
            raise Uncovered("a parameter with a row for each sample")
        summed = [i for i in range(2, terms.ndim) if shape[i - 1] == 1 and terms.shape[i] > 1]
        terms = terms.sum(summed, keepdim=True) if summed else terms
        return terms.reshape(*terms.shape[:2], *self._shape)


class EmbeddingUse(Use):
    """The table of an embedding."""

    def __init__(self, param: int, node: Node, shape: torch.Size):
        super().__init__(param, node)
        self._shape = shape
        self._indices, self._padding = node._saved_indices, node._saved_padding_idx

    def norms(self, delta: Tensor) -> Tensor:
        """|gradient|^2 for each class and sample: positions with the same index add up."""
        index = self.rows(self._indices.unsqueeze(-1)).squeeze(2)
        same = (index.unsqueeze(1) == index.unsqueeze(2)) & (index != self._padding).unsqueeze(1)
        d = self.rows(delta, 1)
        return ((d @ d.transpose(2, 3)) * same).sum((2, 3), dtype=torch.float64)

    def perturbation(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Random signs, the same ones at positions with the same index."""
        index = self.rows(self._indices.unsqueeze(-1)).squeeze(2)
        first = (index.unsqueeze(2) == index.unsqueeze(1)).to(torch.uint8).argmax(2)  # where an index is met first
        signs = draw_like(self.rows(like), "rademacher", generator)
        signs = signs.gather(1, first.unsqueeze(2).expand_as(signs))
        return self.placed(signs * (index != self._padding).unsqueeze(2), like)

    def changes(self, v: Tensor, like: Tensor) -> Tensor:
        """How the operation's output changes."""
        index = self.rows(self._indices.unsqueeze(-1))
        return self.placed(v.gather(1, index.expand(-1, -1, v.shape[2])) * (index != self._padding), like)

    def gradients(self, delta: Tensor) -> Tensor:
        """The gradient for each class and sample."""
        index = self.rows(self._indices.unsqueeze(-1))
        d = self.rows(delta, 1) * (index != self._padding)
        found = d.new_zeros(*d.shape[:2], *self._shape)
        return found.scatter_add_(2, index.expand_as(d[0]).expand_as(d), d)


class LookupUse(Use):
    """Entries of a parameter that are taken once, by flat `index`, and broadcast over the samples: positions, say."""

    any_layout = False

    def __init__(self, param: int, node: Node, index: Tensor):
        super().__init__(param, node)
        self._index = index
        self._single = index.unique().numel() == index.numel()

    def norms(self, delta: Tensor) -> Tensor:
        """|gradient|^2 for each class and sample."""
        return squared(delta.flatten(2)) if self._single else super().norms(delta)

    def gradients(self, delta: Tensor) -> Tensor:
        """The gradient for each class and sample."""
        found = delta.new_zeros(*delta.shape[:2], math.prod(self.shape))
        return found.index_add_(2, self._index, delta.flatten(2)).view(*delta.shape[:2], *self.shape)

    def perturbation(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Random signs."""
        return draw_like(like, "rademacher", generator) if self._single else super().perturbation(like, generator)

    def changes(self, v: Tensor, like: Tensor) -> Tensor:
        """How the operation's output changes."""
        return v.flatten(1)[:, self._index].reshape(like.shape)


class Uncovered(ValueError):
    """A parameter is used in a way whose per-sample gradient is not known here."""


def refusing(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Turns the errors of an operation that is not shaped as its name says into `Uncovered`."""

    @wraps(function)
    def refused(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, RuntimeError) as error:
            raise Uncovered(f"an operation is not as its name says ({first_line(error)})") from error

    return refused


def _signs(a: Tensor, outputs: int, generator: torch.Generator) -> Tensor:
    """Random signs that `a` (samples, positions, inputs) is multiplied with: (samples, inputs, outputs)."""
    return draw_like(a.new_empty(len(a), a.shape[2], outputs), "rademacher", generator)
