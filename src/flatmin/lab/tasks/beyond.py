"""Tasks on which SAM and Monge SAM are run beyond the radius that is best for SAM."""

from __future__ import annotations

from dataclasses import replace

from flatmin.lab.tasks.task import Task


def beyond(task: Task, factor: int) -> Task:
    """The task, with SAM's settings for both and a radius `factor` times as large."""
    best = task.settings["sam"]
    assert best.radius is not None
    settings = replace(best, radius=factor * best.radius)
    return replace(
        task,
        name=f"{task.name}-x{factor}",
        summary=f"{task.name}, for methods at {factor} times SAM's best radius",
        settings={"sam": settings, "monge-sam": settings},
        tuning=f"SAM's settings for {task.name}, with {factor} times the radius, for both.",
    )
