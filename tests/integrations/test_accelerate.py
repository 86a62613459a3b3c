"""Accelerate, the real one, on the CPU: prepared optimizers equal the plain loop in every precision."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from flatmin.integrations.accelerate import probes, windows
from tests.contracts.cases import METHODS, build
from tests.integrations.cpu import fp16_on_cpu

WHOLE = [m for m in METHODS if m not in ("sap", "esam", "nso-split", "rwp")]
X = torch.randn(128, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (128,), generator=torch.Generator().manual_seed(2))


def net(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


def accelerated(
    method: str, precision: str = "no", every: int = 1, clip: float | None = None, size: int = 64
) -> tuple[Any, ...]:
    """Two epochs by Accelerate; returns accelerator, model, the prepared optimizer and the scheduler."""
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=every, mixed_precision="bf16" if precision == "bf16" else "no"
    )
    model = net()
    opt = build(method, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    scheduler = StepLR(opt, 1, 0.9)
    loader = DataLoader(TensorDataset(X, Y), batch_size=64 // every)
    if precision == "fp16":
        model = accelerator.prepare(model)
        fp16_on_cpu(accelerator)
        opt, loader, scheduler = accelerator.prepare(opt, loader, scheduler)
    else:
        model, opt, loader, scheduler = accelerator.prepare(model, opt, loader, scheduler)
    for _ in range(2):
        for window in windows(accelerator, model, loader):
            for _probe in probes(accelerator, opt):
                for inputs, labels in window:
                    accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
            if clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            scheduler.step()
            opt.zero_grad()
    return accelerator, accelerator.unwrap_model(model), opt, scheduler


def plain(method: str, precision: str = "no", clip: float | None = None) -> nn.Module:
    model = net()
    opt = build(method, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    scheduler = StepLR(opt, 1, 0.9)
    for _ in range(2):
        for inputs, labels in zip(X.split(64), Y.split(64), strict=True):
            for _probe in opt.probes():
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    outputs = model(inputs)
                nn.functional.cross_entropy(outputs.float(), labels).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            scheduler.step()
    return model


def assert_close(a: nn.Module, b: nn.Module, atol: float = 1e-6) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=atol, rtol=0)


@pytest.mark.parametrize("method", WHOLE)
def test_it_equals_the_plain_loop(method):
    _, model, opt, _ = accelerated(method)
    for p, q in zip(model.parameters(), plain(method).parameters(), strict=True):
        assert torch.equal(p, q)
    assert opt.optimizer.num_steps == 4


@pytest.mark.parametrize("method", WHOLE)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_with_a_scaler(method, clip):
    accelerator, model, opt, scheduler = accelerated(method, "fp16", clip=clip)
    assert_close(model, plain(method, clip=clip))
    assert accelerator.scaler.get_scale() == 65536.0
    assert scheduler.get_last_lr()[0] == pytest.approx(0.1 * 0.9**4)
    assert not opt.step_was_skipped


@pytest.mark.parametrize("method", ["sam", "nso"])
def test_bf16(method):
    _, model, _, _ = accelerated(method, "bf16")
    for p, q in zip(model.parameters(), plain(method, "bf16").parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("method", WHOLE)
@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_four_micro_batches_of_16_equal_one_batch_of_64(method, precision):
    _, model, opt, scheduler = accelerated(method, precision, every=4, clip=0.5)
    assert_close(model, plain(method, clip=0.5))
    assert opt.optimizer.num_steps == 4
    assert scheduler.get_last_lr()[0] == pytest.approx(0.1 * 0.9**4)


def test_an_overflow_skips_the_step_and_the_scheduler():
    accelerator, model, opt, scheduler = accelerated("sam", "fp16")
    before = [p.detach().clone() for p in model.parameters()]
    for number, _ in enumerate(probes(accelerator, opt)):
        accelerator.backward(nn.functional.cross_entropy(model(X), Y) * (float("inf") if number == 0 else 1.0))
    opt.step()
    scheduler.step()
    opt.zero_grad()
    assert opt.step_was_skipped
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert scheduler.get_last_lr()[0] == pytest.approx(0.1 * 0.9**4)
    assert accelerator.scaler.get_scale() == 32768.0
    assert (opt.optimizer.num_skipped, opt.optimizer.num_steps) == (1, 5)


def test_the_positional_closure_is_refused():
    accelerator, model, opt, _ = accelerated("sam", "fp16")

    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        accelerator.backward(loss)
        return loss

    closure()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"flatmin.integrations.accelerate.probes"):
        opt.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_closure_without_a_scaler():
    accelerator, model, opt, _ = accelerated("sam")
    other = plain("sam")
    control = flatmin.SAM(torch.optim.SGD(other.parameters(), lr=0.1))

    def closure_of(opt, model):
        def closure():
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(X), Y)
            accelerator.backward(loss)
            return loss

        return closure

    control.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.step(closure_of(opt, model))
    control.step(closure_of(control, other))
    assert_close(model, other, atol=0)


def test_a_step_without_probes_raises():
    accelerator, model, opt, _ = accelerated("sam")
    accelerator.backward(nn.functional.cross_entropy(model(X), Y))
    with pytest.raises(ValueError, match="before any gradient"):
        opt.step()


def test_an_optimizer_that_is_not_ours_is_named():
    accelerator = accelerate.Accelerator(cpu=True)
    opt = accelerator.prepare(torch.optim.SGD(net().parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"needs a flatmin optimizer, got AcceleratedOptimizer"):
        probes(accelerator, opt)


def test_a_saved_state_resumes(tmp_path):
    def step(accelerator, model, opt):
        for _ in probes(accelerator, opt):
            accelerator.backward(nn.functional.cross_entropy(model(X), Y))
        opt.step()

    accelerator, model, opt, _ = accelerated("nso")
    accelerator.save_state(tmp_path)
    step(accelerator, model, opt)
    expected = [p.detach().clone() for p in model.parameters()]
    accelerator.load_state(tmp_path)
    assert opt.optimizer.num_steps == 4
    step(accelerator, model, opt)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected, strict=True))


SCRIPT = """
import torch
from accelerate import Accelerator
from safetensors.torch import save_model
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
import flatmin
from flatmin.integrations.accelerate import probes, windows

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
assert accelerator.num_processes == 2
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 3))
opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05, sync_ascent=True)
x = torch.randn(128, 6, generator=torch.Generator().manual_seed(1))
y = torch.randint(3, (128,), generator=torch.Generator().manual_seed(2))
parts = list(zip(x.split(16), y.split(16), strict=True))
model, opt = accelerator.prepare(model, opt)
reductions = []


def reduce(group, bucket):
    reductions.append(bucket)
    return allreduce_hook(group, bucket)


model.register_comm_hook(None, reduce)
for _ in range(2):
    for window in windows(accelerator, model, parts[accelerator.process_index :: 2]):
        for _probe in probes(accelerator, opt):
            for inputs, labels in window:
                accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
        opt.step()
assert len(reductions) == 2 * 2 * 2  # epochs, windows, probes: once for the two micro-batches of a probe
if accelerator.is_main_process:
    save_model(accelerator.unwrap_model(model), "weights.safetensors")
model, opt = accelerator.free_memory(model, opt)  # else the hook lives in threads that outlast the interpreter
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    from safetensors.torch import load_model

    (tmp_path / "train.py").write_text(SCRIPT)
    source = str(Path(flatmin.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": source, "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    # What `accelerate launch --multi_gpu` runs.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    model = net()
    load_model(model, tmp_path / "weights.safetensors")
    one = net()
    opt = flatmin.SAM(torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9), rho=0.05)
    for _ in range(2):
        for inputs, labels in zip(X.split(64), Y.split(64), strict=True):
            for _probe in opt.probes():
                nn.functional.cross_entropy(one(inputs), labels).backward()
            opt.step()
    assert_close(model, one)


def test_a_closure_where_micro_batches_are_accumulated_is_refused():
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    try:
        model = net()
        model, opt = accelerator.prepare(model, flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1)))
        accelerator.gradient_state._set_sync_gradients(True)  # as at the last micro-batch
        with pytest.raises(ValueError, match="the others would be lost"):
            opt.step(lambda: nn.functional.cross_entropy(model(X), Y))
    finally:
        accelerator.gradient_accumulation_steps = 1


def test_a_plain_optimizer_beside_an_accelerator_that_accumulates_is_left_alone():
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    try:
        model = net()
        opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1))

        def closure():
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(X), Y)
            loss.backward()
            return loss

        assert opt.step(closure) > 0
    finally:
        accelerator.gradient_accumulation_steps = 1
