"""`flatmin train`: one run on one process, or the same run on Accelerate, where a launcher started it."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.amp.grad_scaler import GradScaler

import flatmin
from flatmin.lab.cli import main
from flatmin.lab.launch import Train
from flatmin.lab.processes import Alone, Together, launched
from flatmin.lab.records import read_run
from flatmin.lab.tasks import Settings, get_task
from flatmin.lab.train import RunSpec, train
from tests.integrations.cpu import fp16_on_cpu

ARGUMENTS = ["train", "--num-gradients", "8", "--seed", "3"]
ACCELERATE = ["accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no"]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    # Accelerate's own way to several processes on CPUs is MPI; this is torchrun, with Accelerate's settings.
    "accelerate": [
        *(*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
        *("--mixed_precision", "no"),
    ],
    "bf16": [*ACCELERATE, "--cpu", "--num_processes", "1", "--mixed_precision", "bf16"],
}
# A run in half precision differs by more than the rounding of fp32, and by no more than a few ReLUs that lie within its
# own rounding (0.001 for fp16, 0.008 for bf16) of their kink, and flip.
HALF, FLIPS = 1e-4, 0.1


@pytest.fixture
def environment(monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def outcome(folder, name):
    """The record of a run, and its weights as one vector."""
    return read_run(folder / f"{name}.jsonl"), vector(load_file(folder / f"{name}.safetensors"))


def vector(state):
    return torch.cat([state[key].flatten() for key in sorted(state)])


def trained(folder, method, processes, steps=20):
    settings = Settings(lr=0.1, radius=None if method == "base" else 0.05)
    folder.mkdir()
    train(
        RunSpec(task="digits", method=method, seed=3, num_steps=steps, settings=settings), folder, processes=processes
    )
    return outcome(folder, f"{method}-seed3")


def difference(weights, other):
    """Of two ends of a run, in units of the distance from its start."""
    torch.manual_seed(3)
    start = vector(get_task("digits").build_model().state_dict())
    return float((weights - other).norm() / (weights - start).norm())


def test_one_process(tmp_path, capsys, environment):
    environment.setitem(sys.modules, "accelerate", None)  # which a plain run does not need
    arguments = [*ARGUMENTS, "--method", "nso", "--out", str(tmp_path)]
    assert main(arguments) == 0
    record, _ = outcome(tmp_path, "nso-seed3")
    assert record.finished
    assert record.header["spec"]["seed"] == 3
    assert record.header["spec"]["num_steps"] == record.result["steps"] == 4
    assert "processes" not in record.header
    said = capsys.readouterr().out
    assert "\nstatus finished, " in said
    assert f"test_loss {record.result['test_loss']:.4g}" in said
    assert f"trace {record.result['flatness']['trace']['value']:.4g}, top_eigenvalue" in said
    assert main(arguments) == 2
    assert "never overwritten" in capsys.readouterr().err


def test_a_run_that_diverges_says_so(tmp_path, capsys, monkeypatch, environment):
    given = RunSpec(task="digits", method="base", seed=0, num_steps=40, settings=Settings(lr=1e8))
    monkeypatch.setattr(Train, "spec", lambda _: given)
    with pytest.raises(ValueError, match="base on digits, seed 0: "):
        Train(out=tmp_path).run()  # so that the exit status says it, too
    assert "status diverged, message base on digits, seed 0: " in capsys.readouterr().out
    assert not read_run(tmp_path / "base-seed0.jsonl").finished


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("number", [2, 3])
def test_shares_of_a_batch_make_up_its_mean(size, number):
    losses, labels = torch.rand(size), torch.arange(size)
    total, seen = 0.0, []
    for index in range(number):
        process = Together.__new__(Together)
        process.number, process._accelerator = number, SimpleNamespace(process_index=index)
        (part, rows), weight = process.share((losses, labels))
        total += weight * part.mean().item() / number  # DDP averages over the processes
        seen += rows.tolist()
        with pytest.raises(ValueError, match="a batch of 1 samples cannot be shared"):
            process.share((losses[:1], labels[:1]))
    assert total == pytest.approx(losses.mean().item())
    assert sorted(seen) == labels.tolist()


def test_without_a_launcher_a_process_is_alone(environment):
    assert type(launched()) is Alone
    environment.setenv("WORLD_SIZE", "1")
    assert type(launched()) is Together


@pytest.mark.parametrize("method", ["base", "sam", "nso", "sap", "esam"])
def test_a_launched_process_gives_the_bits_of_a_plain_run(method, tmp_path, environment):
    plain, weights = trained(tmp_path / "plain", method, Alone())
    environment.setenv("ACCELERATE_MIXED_PRECISION", "no")
    environment.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # is not of this loop
    record, on_accelerate = trained(tmp_path / "launched", method, launched())
    assert record.header["processes"] == 1
    assert record.progress == plain.progress
    assert torch.equal(on_accelerate, weights)


@pytest.mark.parametrize("method", ["base", "nso"])
@pytest.mark.parametrize("scale", [2.0**16, 2.0**24])
def test_fp16_goes_through_the_scaler(method, scale, tmp_path, environment):
    real = accelerate.Accelerator

    def with_scaler(**options):
        accelerator = real(**options)
        fp16_on_cpu(accelerator)
        accelerator.scaler = GradScaler("cpu", init_scale=scale)
        return accelerator

    environment.setattr(accelerate, "Accelerator", with_scaler)
    environment.setenv("ACCELERATE_MIXED_PRECISION", "no")
    processes = launched()
    record, weights = trained(tmp_path / "fp16", method, processes)
    found = processes._accelerator.scaler.get_scale()  # type: ignore[attr-defined]
    assert record.finished
    assert record.header["mixed_precision"] == "fp16"
    if scale == 2.0**24:  # too large for half precision: steps are skipped until it is found, and that is no divergence
        assert 1.0 < found < scale
    else:
        _, plain = trained(tmp_path / "plain", method, Alone())
        assert found == scale
        assert HALF < difference(weights, plain) < FLIPS


def test_what_accelerate_would_do_quietly_is_refused(environment):
    environment.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match=r"fp16 needs a scaler, which Accelerate does not have on cpu.* Use bf16"):
        launched()


@pytest.mark.parametrize(
    ("kind", "number", "message"),
    [
        (DistributedType.FSDP, 2, "keeps all weights in each process, to measure their flatness, and FSDP would not"),
        (DistributedType.NO, 1, "started 2 processes, but Accelerate cannot join them on mps"),
    ],
)
def test_processes_that_could_not_work_together_are_refused(kind, number, message, environment):
    environment.setenv("WORLD_SIZE", "2")
    process = Together.__new__(Together)
    process._accelerator = SimpleNamespace(distributed_type=kind, mixed_precision="no", scaler=None)
    process.number, process.device = number, torch.device("mps")
    with pytest.raises(ValueError, match=message):
        process._check()


def launch(launcher, method, folder):
    """A run by a real launcher, and by this process alone."""
    source = str(Path(flatmin.__file__).parent.parent)
    settings = {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder), "ACCELERATE_USE_CPU": "true"}
    arguments = [*ARGUMENTS, "--method", method]
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "flatmin", *arguments, "--out", "launched"],
        cwd=folder,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert main([*arguments, "--out", str(folder / "plain")]) == 0
    return outcome(folder / "launched", f"{method}-seed3"), outcome(folder / "plain", f"{method}-seed3")


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "method"), [("torchrun", "base"), ("accelerate", "nso")])
def test_two_processes_train_the_run_of_one(launcher, method, tmp_path, environment):
    (two, weights), (one, plain) = launch(launcher, method, tmp_path)
    assert two.header["processes"] == 2
    assert two.header["mixed_precision"] == "no"
    torch.testing.assert_close(weights, plain, atol=1e-6, rtol=0)
    assert float((weights - plain).abs().max()) > 0  # two sums are not one, to the last bit: they did share
    for a, b in zip(one.progress, two.progress, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-6)
    value = one.result["flatness"]["trace"]["value"]
    assert value == pytest.approx(two.result["flatness"]["trace"]["value"], rel=1e-4)
    # and not the run of another seed
    assert one.progress[0]["train_loss"] != pytest.approx(one.progress[-1]["train_loss"], abs=1e-4)


@pytest.mark.slow
def test_bf16_is_said_and_seen(tmp_path, environment):
    (record, weights), (_, plain) = launch("bf16", "nso", tmp_path)
    assert record.header["mixed_precision"] == "bf16"
    assert HALF < difference(weights, plain) < FLIPS
    # Scores are those of the weights in full precision.
    model = get_task("digits").build_model()
    model.load_state_dict(load_file(tmp_path / "launched" / "nso-seed3.safetensors"))
    inputs, labels = get_task("digits").load(3).test
    assert float(get_task("digits").criterion(model(inputs), labels).detach()) == record.result["test_loss"]
