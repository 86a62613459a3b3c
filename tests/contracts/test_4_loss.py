"""Contract 4: `step` returns the loss at the unperturbed weights where the rule evaluates there, else the mean."""

import pytest
import torch

from tests.contracts.cases import Case, each_method


@each_method
def test_the_returned_loss(method):
    case = Case(method)
    here = case.loss().detach()
    twin, at_weights = Case(method), []
    for probe in twin.optimizer.probes():
        at_weights.append(probe.at_weights and probe.part is None)
        twin.loss().backward()

    seen = []

    def closure():
        loss = case.closure()
        seen.append(loss.detach())
        return loss

    returned = case.optimizer.step(closure)
    if any(at_weights):
        assert torch.equal(returned, here)
    else:
        torch.testing.assert_close(returned, torch.stack(seen).mean())
        assert not torch.equal(returned, here)
    assert not returned.requires_grad  # a kept loss must not keep the graph


@each_method
def test_a_loss_tensor_that_the_caller_writes_again(method):
    case, total = Case(method), torch.zeros(())

    def closure():
        case.optimizer.zero_grad()
        total.zero_()
        loss = case.loss()
        loss.backward()
        return total.add_(loss.detach())

    torch.testing.assert_close(case.optimizer.step(closure), Case(method).step())


@each_method
def test_a_loss_with_a_history_that_is_written_over_later(method):
    case, seen = Case(method), []

    def closure():
        loss = case.closure()
        with torch.no_grad():
            for earlier in seen:
                earlier.fill_(-1.0)
        seen.append(loss)
        return loss

    torch.testing.assert_close(case.optimizer.step(closure), Case(method).step())


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_has_the_kind_of_what_the_closure_returned(method, dtype):
    case = Case(method)

    def closure():
        return case.closure().to(dtype).view(1)

    with torch.device("meta"):  # the default device, which losses are not on
        returned = case.optimizer.step(closure)
    assert (returned.dtype, returned.shape, returned.device.type) == (dtype, (1,), "cpu")


@each_method
def test_a_number_is_a_number(method):
    case, twin = Case(method), Case(method)
    returned = case.optimizer.step(lambda: case.closure().item())  # type: ignore[arg-type]
    assert isinstance(returned, float)
    assert returned == pytest.approx(twin.step().item(), rel=1e-6)
