"""`flatmin train`: one run, on one process or several."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from flatmin.lab.compare import Compare
from flatmin.lab.processes import launched
from flatmin.lab.records import read_run
from flatmin.lab.script import forget
from flatmin.lab.tasks import get_task
from flatmin.lab.tasks.check import check_task
from flatmin.lab.train import RunSpec, train


@dataclass(kw_only=True)
class Train:
    """Train one run: a method on a task, with the task's settings or --tuned ones, and measure how flat it ended.

    A plain run takes one process on the CPU. Started by `accelerate launch -m flatmin train ...` or `torchrun
    --nproc-per-node 2 -m flatmin train ...` it runs on Accelerate: on GPUs, in bf16 or fp16, on several processes. They
    share each batch, so that the run is the same up to rounding (and up to batch statistics, dropout and mixup, and for
    methods that look for the ascent on each process by itself, such as SAM).
    """

    task: str = "digits"
    """Data, model and loss: a name (see: flatmin tasks), or a Python file that makes one Task."""
    method: str = "nso"
    """Method, by name (see: flatmin methods), alone or with parts: sam+swa."""
    seed: int = 0
    """Fixes the training samples, the initial weights and the batch order."""
    num_gradients: int | None = None
    """Mini-batch gradients to spend. Default: the task's."""
    tuned: Path | None = None
    """tuning.json of flatmin tune: its winners are the settings, and its budget is the default. Default: the task's."""
    out: Path | None = None
    """Where <method>-seed<seed>.jsonl and .safetensors are written. Default: runs/train-<task>."""

    if_stopped: ClassVar[str] = "Of a run that is not finished nothing is used; the same command begins it again."

    def spec(self) -> RunSpec:
        """The run.

        Raises:
            ValueError: for an unknown task or method, or one without settings for this task.
        """
        (spec,) = Compare(
            task=self.task,
            methods=(self.method,),
            num_seeds=1,
            num_gradients=self.num_gradients,
            budget=None if self.num_gradients is None else "gradients",  # a tuning may have been by steps
            tuned=self.tuned,
        ).specs()
        return replace(spec, seed=self.seed)

    def run(self) -> None:
        """Trains, prints progress, and in the end what came out.

        Raises:
            ValueError: for a run that is there already, a task that would mislead, or a run that diverged (its record
                is kept).
        """
        forget()
        spec, task, processes = self.spec(), get_task(self.task), launched()
        out = Path("runs") / f"train-{task.name}" if self.out is None else self.out
        path = out / f"{spec.name}.jsonl"
        if path.exists():  # on every process, so that none waits for another
            raise ValueError(f"{path} is finished, and a finished run is never overwritten. Choose another --out.")
        check_task(task, self.seed)
        out.mkdir(parents=True, exist_ok=True)
        if processes.is_first and processes.about():
            print(", ".join(f"{name} {value}" for name, value in processes.about().items()))
        diverged = None
        train(spec, out, _report if processes.is_first else lambda *_: None, processes)
        if processes.is_first:
            result = read_run(path).result
            flatness = {k: part["value"] for k, part in result.get("flatness", {}).items() if k != "loss"}
            values = {k: v for k, v in result.items() if isinstance(v, (int, float, str)) and k != "type"} | flatness
            print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()))
            print(path)
            diverged = result.get("message")
        processes.end()
        if processes.is_first and diverged:
            raise ValueError(diverged)


def _report(name: str, step: int, num_steps: int, loss: float) -> None:
    print(f"{name}: step {step} of {num_steps}, loss {loss:.4f}")
