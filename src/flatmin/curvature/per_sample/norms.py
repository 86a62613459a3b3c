"""Squared norms of the gradients of single samples, for any network, from the graph that autograd recorded.

No module is replaced and no hook is set: the graph says which operation takes which parameter. A backward pass is
asked for the gradients by the *outputs* of these operations (and so computes no weight gradient); what a sample
contributes to each parameter follows (`uses`). A parameter used several times has its contributions added up first.

Where the samples are in such an output is found by a backward pass from each half of them: what belongs to the other
half must be zero. If there is no such place, the samples are mixed (batch norm in training mode, say): refused.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from flatmin.curvature.per_sample.outer import squared
from flatmin.curvature.per_sample.recorded import LOOKUPS, TRANSPOSED, lookup_of, uses_of
from flatmin.curvature.per_sample.uses import Layout, Uncovered, Use, refusing
from flatmin.curvature.products.graph import Node, kind, nodes
from flatmin.noise import draw_like

CHUNK = 2**28  # bytes of gradients that wait to be processed together


class PerSample:
    """The uses of parameters between `params` and `outputs` of a batch.

    Args:
        outputs: (samples, ...), with their graph.
        params: the parameters.
        layouts: of another batch of the same model, to save the passes that find them. They are verified, as all is
            that the operations claim: for one sample, drawn at random, the squared norms must be those of its gradient,
            and those of the others zero.

    Attributes:
        uses: of all parameters.
        edges: of the operations, where gradients by their outputs arrive.
        at: for each use the number of its edge.
        layouts: for each use; none if a single sample cannot tell.

    Raises:
        Uncovered: if a parameter is used in a way that is not known, or samples are mixed.

    Cost: two thirds of a gradient, and twice that to find layouts.
    """

    @refusing
    @torch.no_grad()
    def __init__(self, outputs: Tensor, params: Sequence[Tensor], layouts: Sequence[Layout] | None = None):
        self._outputs, self._params = outputs, params
        self._samples = len(outputs)
        self.uses = _find_uses(outputs, params)
        by_node: dict[object, int] = {}
        self.at = [by_node.setdefault(use.node, len(by_node)) for use in self.uses]  # use -> its delta
        self.edges = [GradientEdge(node, 0) for node in by_node]  # type: ignore[arg-type]
        if layouts is None or len(layouts) != len(self.uses) or not self._holds(layouts):
            layouts = self._find_layouts()
            if not self._holds(layouts):
                raise Uncovered("an operation is not what its name says, or its samples are not told apart")
        self.layouts = layouts if self._samples > 1 else []  # a single sample is at either place

    @refusing
    @torch.no_grad()
    def squared_norms(self, vectors: Tensor, signs: Tensor) -> Tensor:
        """sum_i s_ki |J_i' u_ki|^2 for each k and each parameter: (k, parameters), float64.

        Args:
            vectors: u, (k, *outputs).
            signs: s, (k, samples).

        Cost: for each k about two thirds of a gradient.
        """
        totals = torch.zeros(len(vectors), len(self._params), dtype=torch.float64, device=vectors.device)
        start, waiting = 0, []
        for k in range(len(vectors)):
            waiting.append(self._deltas(vectors[k]))
            size = len(waiting) * sum(d.numel() * d.element_size() for d in waiting[0])
            if size > CHUNK or k + 1 == len(vectors):
                self._add(totals[start : k + 1], waiting, signs[start : k + 1])
                start, waiting = k + 1, []
        return totals

    def _deltas(self, vector: Tensor) -> list[Tensor]:
        """The gradient of <vector, outputs> by the output of each operation that takes a parameter."""
        if not self.edges:
            return []
        return list(
            torch.autograd.grad(self._outputs, self.edges, grad_outputs=vector, retain_graph=True, allow_unused=False)
        )

    def _add(self, totals: Tensor, waiting: list[list[Tensor]], signs: Tensor) -> None:
        for param, norms in self._norms(waiting):
            totals[:, param] = (signs * norms).sum(1)

    def _norms(self, waiting: list[list[Tensor]], alone: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Each parameter, and |gradient|^2 by it for each class and sample: (classes, samples).

        All but the sample `alone`, if it is given, should have none.
        """
        count = Counter(use.param for use in self.uses)
        stacked: dict[int, Tensor] = {}  # the latest: uses by one operation follow each other
        for use, at in zip(self.uses, self.at, strict=True):
            if count[use.param] == 1:
                if at not in stacked:
                    stacked = {at: torch.stack([deltas[at] for deltas in waiting])}
                delta = stacked[at]
                yield use.param, use.norms(delta) if alone is None else use.norms_alone(delta, alone)
        for param in (param for param, uses in count.items() if uses > 1):
            yield param, torch.cat([self._norms_of_sum(param, deltas) for deltas in waiting])

    def _norms_of_sum(self, param: int, deltas: list[Tensor]) -> Tensor:
        """For a parameter with several uses the gradients themselves are needed: one class at a time."""
        parts = [
            use.gradients(deltas[at].unsqueeze(0))
            for use, at in zip(self.uses, self.at, strict=True)
            if use.param == param
        ]
        return squared(sum(parts[1:], parts[0]).flatten(2))

    def _holds(self, layouts: Sequence[Layout]) -> bool:
        """Whether with these layouts the norms of a random sample are those of its gradient, and the others zero."""
        for use, layout in zip(self.uses, layouts, strict=True):
            use.layout, use.samples = layout, self._samples
        generator = torch.Generator(self._outputs.device).manual_seed(self._samples)
        sample = int(torch.randint(self._samples, (), generator=generator, device=self._outputs.device))
        vector = torch.zeros_like(self._outputs)
        vector[sample] = draw_like(self._outputs[sample], "normal", generator)
        used = sorted({use.param for use in self.uses})
        inputs = [*self.edges, *(self._params[i] for i in used)]
        if not inputs:
            return True
        found = torch.autograd.grad(self._outputs, inputs, grad_outputs=vector, retain_graph=True)
        gradients = dict(zip(used, found[len(self.edges) :], strict=True))
        sizes = {param: float(torch.linalg.vector_norm(g.double())) for param, g in gradients.items()}
        eps, largest = torch.finfo(vector.dtype).eps, max(sizes.values())
        for param, squares in self._norms([list(found[: len(self.edges)])], alone=sample):
            norms = squares[0].clamp(min=0).sqrt()
            wrong = (norms[sample] - sizes[param]).abs() + norms.sum() - norms[sample]
            if wrong > 1e3 * eps * sizes[param] + 1e2 * eps * largest and wrong.isfinite():  # else: `check_finite`
                return False
        return True

    def _find_layouts(self) -> list[Layout]:
        if self._samples == 1:
            return ["first"] * len(self.uses)
        generator = torch.Generator(self._outputs.device).manual_seed(0)
        order = torch.randperm(self._samples, generator=generator, device=self._outputs.device)
        vector = draw_like(self._outputs, "normal", generator)
        seen = []  # the samples that are absent, and the deltas: for one half, and for the other
        for absent in order.tensor_split(2):
            part = vector.index_fill(0, absent, 0.0)
            seen.append((absent, self._deltas(part)))
        return [
            _layout([(absent, deltas[at]) for absent, deltas in seen], self._samples, use.any_layout)
            for use, at in zip(self.uses, self.at, strict=True)
        ]


def _layout(seen: list[tuple[Tensor, Tensor]], samples: int, any_layout: bool) -> Layout:
    """Where the samples are in a delta, which must be zero at the samples that are absent."""
    shape = seen[0][1].shape
    first = shape[0] == samples or (any_layout and shape[0] % samples == 0)
    if first and not any(delta.reshape(samples, -1)[absent].any() for absent, delta in seen):
        return "first"
    second = any_layout and shape[:-1].numel() % samples == 0
    if second and not any(delta.reshape(-1, samples, shape[-1])[:, absent].any() for absent, delta in seen):
        return "second"
    raise Uncovered("the samples of a batch are mixed")


def _find_uses(outputs: Tensor, params: Sequence[Tensor]) -> list[Use]:
    index = {p: i for i, p in enumerate(params)}
    shapes = {i: p.shape for i, p in enumerate(params)}
    uses: list[Use] = []
    operations = list(nodes([outputs]))
    above: dict[Node, list[Node]] = defaultdict(list)
    for node in operations:
        for child, _ in node.next_functions:
            above[child].append(node)
    for node in operations:
        if kind(node) in TRANSPOSED and _param(node, index) is not None:
            continue  # the transposed weight of a linear layer: its product is the use
        arguments = {
            position: param
            for position, (child, _) in enumerate(node.next_functions)
            if (param := _param(child, index)) is not None
        }
        if 0 in arguments and kind(node) in LOOKUPS:
            param = arguments[0]
            if (use := lookup_of(node, param, shapes[param], above, len(outputs))) is not None:
                uses.append(use)
                continue
        if arguments:
            uses += uses_of(node, arguments, shapes)
    return uses


def _param(node: Node, index: dict[Tensor, int]) -> int | None:
    """The parameter that `node` stands for: itself, or transposed."""
    if node is not None and kind(node) in TRANSPOSED:
        node = node.next_functions[0][0]
        if getattr(getattr(node, "variable", None), "ndim", 2) != 2:
            return None
    variable = getattr(node, "variable", None)
    return None if variable is None else index.get(variable)
