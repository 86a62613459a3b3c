"""The migration page: the right column runs, and calls on the left raise an error that names the right."""

import pickle
import re
from inspect import signature
from pathlib import Path

import pytest
import torch
from torch import nn

import flatmin
from flatmin.optim.engine.migration import FUNCTIONS

PAGE = (Path(__file__).parent.parent / "docs" / "how-to" / "migrate.md").read_text()
CODE = re.compile(r"^`([^`]+)`$")
FUNCTION = re.compile(rf"\b({'|'.join(FUNCTIONS)})\(")


def sections() -> list[tuple[str, list[tuple[str, str]]]]:
    """Per package the rows of its table."""
    found = []
    for section in PAGE.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        rows = [line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("| ")]
        found.append((title, [(row[0].strip(), row[1].strip()) for row in rows[1:]]))
    return found


def names() -> dict:
    torch.manual_seed(0)
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    model, loss_fn = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), nn.CrossEntropyLoss()
    space: dict = {"flatmin": flatmin, "torch": torch, "model": model, "loss_fn": loss_fn, "x": x, "y": y}
    space["criterion"] = loss_fn

    def closure():
        space["opt"].zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    ours = {name: getattr(flatmin, name) for name in ("SAM", "NSO", "LookSAM", "FriendlySAM")}
    return {**ours, **space, "closure": closure, "loader": [(x[:8], y[:8]), (x[8:], y[8:])]} | {"_space": space}


@pytest.mark.parametrize(("title", "rows"), sections(), ids=lambda value: value if isinstance(value, str) else "")
def test_each_row(title, rows, capsys):
    space = names()
    num_run = 0
    for there, here in rows:
        if left := CODE.match(there):
            with pytest.raises((ValueError, AttributeError)) as error:
                exec(FUNCTION.sub(r"flatmin.\1(", left[1]), space)
            if (right := CODE.match(here)) and " = flatmin." in right[1]:
                assert right[1].partition(" = flatmin.")[2] in str(error.value)
            elif right:
                wanted = right[1].split(":")[0].split("[")[0].split(" = ")[0]
                assert wanted in str(error.value), (wanted, str(error.value))
        if right := CODE.match(here):
            exec(right[1], space)
            space["_space"].update({k: space[k] for k in ("opt",) if k in space})
            num_run += 1
    assert num_run >= 4


def test_the_right_side_gives_what_the_left_side_gave():
    """One step of davda54's SAM, written out by hand, against the loop."""
    space = names()
    model, x, y, loss_fn = (space[name] for name in ("model", "x", "y", "loss_fn"))
    start = [p.detach().clone() for p in model.parameters()]
    gradients = torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    with torch.no_grad():
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.add_(0.05 * g / norm)
    ascended = torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()))
    with torch.no_grad():
        for p, w in zip(model.parameters(), start, strict=True):
            p.copy_(w)
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)
    for _ in opt.probes():
        loss_fn(model(x), y).backward()
    opt.step()
    for p, w, g in zip(model.parameters(), start, ascended, strict=True):
        torch.testing.assert_close(p, w - 0.1 * g, atol=1e-6, rtol=0)


def test_signatures_and_attributes_are_the_usual_ones():
    model = nn.Linear(2, 2)
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    assert list(signature(flatmin.SAM).parameters)[:2] == ["base", "rho"]
    assert list(signature(flatmin.FlatOptimizer).parameters)[:2] == ["base", "radius"]
    assert not hasattr(opt, "first_step")
    with pytest.raises(AttributeError, match="'SAM' object has no attribute 'nonsense'"):
        _ = opt.nonsense  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="parameters go to the base optimizer"):
        flatmin.SAM(model.parameters(), rho=0.05)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got the class SGD"):
        flatmin.SAM(torch.optim.SGD)  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(opt)).param_groups[0]["rho"] == 0.05


def test_a_function_of_another_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"flatmin has no hessian\(\): write\n +objective = flatmin.Objective"):
        _ = flatmin.hessian  # type: ignore[attr-defined]
    assert not any(hasattr(flatmin, name) for name in FUNCTIONS)
    with pytest.raises(AttributeError, match=r"module 'flatmin' has no attribute 'SAMM'$") as error:
        _ = flatmin.SAMM  # type: ignore[attr-defined]
    assert (error.value.name, error.value.obj) == ("SAMM", flatmin)  # Python's own "Did you mean"
