"""Contract 8 with compiled models: the first probe alone moves buffers, and nothing is compiled again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flatmin
from tests.contracts.cases import Case, each_method

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),  # torch's own, in its compiler
    pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning"),  # that there is a hook
]
STEPS = 4


class Run:
    """A few steps of SAM on a small network, compiled in some way."""

    def __init__(self, *, named: bool = False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
        self.head = nn.BatchNorm1d(3)
        self.x, self.y = torch.randn(32, 8), torch.randint(3, (32,))
        params = [*self.model.parameters(), *self.head.parameters()]
        whole = nn.ModuleList([self.model, self.head]) if named else None
        self.optimizer = flatmin.SAM(torch.optim.SGD(params, lr=0.1), rho=0.5, model=whole)
        self.called: Callable[[Tensor], Tensor] = self.model

    def loss(self) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.called(self.x)), self.y)

    def steps(self, loss: Callable[[], Tensor] | None = None) -> list[float]:
        """The losses; buffers must have moved once a step."""
        loss = loss or self.loss

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        before = int(self.model[1].num_batches_tracked)  # type: ignore[arg-type]
        losses = [float(self.optimizer.step(closure)) for _ in range(STEPS)]
        assert int(self.model[1].num_batches_tracked) - before == STEPS  # type: ignore[arg-type]
        assert int(self.head.num_batches_tracked) - before == STEPS  # type: ignore[arg-type]
        return losses


@pytest.fixture
def plain() -> list[float]:
    return Run().steps()


def test_a_compiled_model_is_found_and_what_is_called_after_it(plain):
    from torch._dynamo.utils import counters

    run = Run()
    run.called = torch.compile(run.model, backend="eager")
    compiled_before = counters["frames"]["ok"]
    assert run.steps() == pytest.approx(plain, abs=1e-5)
    assert counters["frames"]["ok"] == compiled_before + 1  # without the hook, once


def test_a_model_that_was_compiled_before_the_first_step_is_not_compiled_again(plain):
    from torch._dynamo.utils import counters

    run = Run()
    run.called = torch.compile(run.model, backend="eager")
    with torch.random.fork_rng():
        run.called(run.x)
    run.model[1].reset_running_stats()  # type: ignore[operator]
    compiled_before = counters["frames"]["ok"]
    assert run.steps() == pytest.approx(plain, abs=1e-5)
    assert counters["frames"]["ok"] == compiled_before


def test_a_compiled_model_does_not_see_the_hook():
    """A first evaluation with the hook and others without it would be two graphs."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    compiled: Any = torch.compile(model, backend="eager")
    optimizer, x = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1)), torch.randn(4, 8)
    compiled_before = counters["frames"]["ok"]
    for _ in range(2):
        for _ in optimizer.probes():
            compiled(x).square().mean().backward()
        optimizer.step()
        compiled(x).square().mean().backward()
    assert counters["frames"]["ok"] == compiled_before + 1


def test_a_part_that_is_compiled_in_place_is_found_in_its_parent(plain):
    run = Run()
    run.model[0].compile(backend="eager")
    assert run.steps() == pytest.approx(plain, abs=1e-5)


def test_after_an_error_inside_a_compiled_model_no_hook_is_left():
    run = Run()
    compiled: Any = torch.compile(run.model, backend="eager")
    run.called, x = compiled, run.x
    run.x = x[:, :3]
    with pytest.raises(RuntimeError):
        run.steps()
    assert not nn.modules.module._global_forward_pre_hooks
    assert not compiled._forward_hooks
    run.x = x
    run.model[1].reset_running_stats()  # type: ignore[operator]
    run.head.reset_running_stats()
    run.steps()


@pytest.mark.parametrize("named", [False, True])
def test_a_model_that_is_compiled_in_place(named, plain):
    run = Run(named=named)
    run.model.compile(backend="eager")
    assert run.steps() == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("named", [False, True])
def test_a_compiled_function(named, plain):
    run = Run(named=named)
    assert run.steps(torch.compile(run.loss, backend="eager")) == pytest.approx(plain, abs=1e-5)


def test_a_compiled_function_that_ran_before_works_with_a_named_model(plain):
    run = Run(named=True)
    loss = torch.compile(run.loss, backend="eager")
    with torch.random.fork_rng():
        loss()
    run.model[1].reset_running_stats()  # type: ignore[operator]
    run.head.reset_running_stats()
    assert run.steps(loss) == pytest.approx(plain, abs=1e-5)


def test_what_others_train_is_found_in_compiled_code_too():
    run = Run()
    teacher = nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3))
    teacher.compile(backend="eager")
    run.steps(lambda: run.loss() + teacher(run.x).square().mean())
    assert teacher[1].num_batches_tracked == STEPS


def test_a_part_that_is_replaced_in_a_compiled_model_is_found():
    run = Run()
    run.called = torch.compile(run.model, backend="eager")
    run.steps()
    run.model[1] = nn.BatchNorm1d(16)
    run.head.reset_running_stats()
    run.steps()


@pytest.mark.parametrize("form", ["loop", "closure"])
@each_method
def test_a_compiled_function_around_the_whole_step_changes_nothing(method, form):
    def after(compiled: bool, warm: int) -> list[Tensor]:
        torch._dynamo.reset()
        case = Case(method, model_name="batchnorm")
        step = case.loop_step if form == "loop" else case.step
        for number in range(3):
            (torch.compile(step, backend="eager") if compiled and number >= warm else step)()
        assert case.optimizer.num_steps == 3
        return [*case.model.state_dict().values()]

    expected = after(False, 0)
    for warm in (0, 1):
        for a, b in zip(after(True, warm), expected, strict=True):
            assert torch.equal(a, b)
