"""`flatmin train`: one run on one process, or the same run shared by several."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flatmin
from flatmin.lab.cli import main
from flatmin.lab.processes import Alone, Together, launched
from flatmin.lab.records import read_run

ARGUMENTS = ["train", "--method", "nso", "--num-gradients", "8", "--seed", "3"]


def test_one_process(tmp_path, capsys):
    assert main([*ARGUMENTS, "--out", str(tmp_path)]) == 0
    record = read_run(tmp_path / "nso-seed3.jsonl")
    assert record.finished
    assert record.header["spec"]["seed"] == 3
    assert record.header["spec"]["num_steps"] == record.result["steps"] == 4
    assert "processes" not in record.header
    assert (tmp_path / "nso-seed3.safetensors").exists()
    assert "test_accuracy" in capsys.readouterr().out
    assert main([*ARGUMENTS, "--out", str(tmp_path)]) == 2
    assert "never overwritten" in capsys.readouterr().err


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


def test_without_a_launcher_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert type(launched()) is Alone


@pytest.mark.slow
def test_two_processes_train_the_run_of_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(flatmin.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "flatmin"]
    done = subprocess.run(
        [*launcher, *ARGUMENTS, "--out", "two"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert main([*ARGUMENTS, "--out", str(tmp_path / "one")]) == 0
    one, two = (read_run(tmp_path / name / "nso-seed3.jsonl") for name in ("one", "two"))
    assert two.header["processes"] == 2
    for a, b in zip(one.progress, two.progress, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-6)
    assert one.result["test_loss"] == pytest.approx(two.result["test_loss"], abs=1e-6)
    value = one.result["flatness"]["trace"]["value"]
    assert value == pytest.approx(two.result["flatness"]["trace"]["value"], rel=1e-4)
    # and not the run of another seed
    assert one.progress[0]["train_loss"] != pytest.approx(one.progress[-1]["train_loss"], abs=1e-4)
