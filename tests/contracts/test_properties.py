"""Any shapes, groups, dtypes and scales: restored bit for bit, no NaN from a zero gradient, norms of what is moved."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import SGD

from flatmin.optim.registry import get_method
from tests.contracts.cases import build, each_method

pytestmark = pytest.mark.filterwarnings("ignore:.*weights are stored in bfloat16, and")  # true, for some radii

SCALES = [1e-30, 1e-8, 1e-3, 1.0, 1e3, 1e8]


@st.composite
def problems(draw):
    """Parameter groups of random shapes and dtypes, with their radii, and the scale of the gradient."""
    shape = st.lists(st.integers(1, 4), min_size=0, max_size=3).map(tuple)
    groups = draw(st.lists(st.lists(shape, min_size=1, max_size=3), min_size=1, max_size=3))
    dtypes = [draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])) for _ in groups]
    radii = [draw(st.sampled_from([0.0, 1e-4, 0.05, 3.0])) for _ in groups]
    return groups, dtypes, radii, draw(st.sampled_from([0.0, *SCALES])), draw(st.integers(0, 2**32 - 1))


class Problem:
    """f = scale * sum_p (weights_p . p + |p|^2 / 2), so that the gradient is known everywhere."""

    def __init__(self, problem, method, **options):
        groups, dtypes, radii, self.scale, seed = problem
        generator = torch.Generator().manual_seed(seed)
        self.radius_name = get_method(method).radius_name or ""
        made = []
        for shapes, dtype, radius in zip(groups, dtypes, radii, strict=True):
            params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
            made.append({"params": params, self.radius_name: radius})
        self.params = [p for group in made for p in group["params"]]
        self.radii = [r for shapes, r in zip(groups, radii, strict=True) for _ in shapes]
        self.slopes = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in self.params]
        self.optimizer = build(method, SGD(made, lr=0.0, momentum=0.9), **options)
        self.seen = []

    def loss(self):
        self.seen.append([p.detach().clone() for p in self.params])
        terms = [(s * p + p * p / 2).sum().float() for s, p in zip(self.slopes, self.params, strict=True)]
        rows = torch.ones(8)
        (rows,) = (self.optimizer.take(rows),)
        return self.optimizer.mean(self.scale * torch.stack(terms).sum() * rows)

    def step(self, form):
        def closure():
            self.optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        if form == "closure":
            return self.optimizer.step(closure)
        for _ in self.optimizer.probes():
            self.loss().backward()
        return self.optimizer.step()


@each_method
@pytest.mark.filterwarnings("ignore:MongeSAM. the gradient norm is")  # true, for some of these scales
@pytest.mark.parametrize("form", ["closure", "loop"])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(problem=problems())
def test_with_learning_rate_zero_no_weight_ever_changes(method, form, problem):
    made = Problem(problem, method)
    before = [(p.data_ptr(), p.detach().clone()) for p in made.params]
    for _ in range(3):
        made.step(form)
    for p, (pointer, value) in zip(made.params, before, strict=True):
        assert p.data_ptr() == pointer
        assert torch.equal(p, value)
    still = [p.grad for p in made.params if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in still)
    # What a radius of zero leaves alone is never moved, and nothing goes to infinity.
    for points in made.seen:
        for point, value, radius in zip(points, (v for _, v in before), made.radii, strict=True):
            assert bool(point.isfinite().all())
            assert radius > 0 or torch.equal(point, value)


@pytest.mark.parametrize("method", ["sam", "rsp"])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(problem=problems())
def test_the_norm_is_over_what_is_moved(method, problem):
    made = Problem(problem, method)
    made.step("closure")
    there = made.seen[-1]
    # With one radius for all that is moved, they move by that radius together.
    moved = [
        (a.double() - p.detach().double()).square().sum()
        for a, p, r in zip(there, made.params, made.radii, strict=True)
        if r > 0 and p.dtype != torch.bfloat16
    ]
    kinds = {(r, p.dtype == torch.bfloat16) for r, p in zip(made.radii, made.params, strict=True) if r > 0}
    if len(kinds) == 1 and moved and made.scale >= 1e-8 and min(kinds)[0] > 1e-3:
        assert math.sqrt(sum(moved)) == pytest.approx(min(kinds)[0], rel=1e-3)
    elif not kinds or (method == "sam" and made.scale == 0):
        assert all(torch.equal(a, p) for a, p in zip(there, made.params, strict=True))
