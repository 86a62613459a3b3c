"""Tasks on which SAM and Monge SAM are run far beyond the radius that is best for SAM."""

from __future__ import annotations

from dataclasses import replace

from flatmin.lab.tasks.task import Task

FACTOR = 8


def far(task: Task) -> Task:
    """The task, with SAM's settings for both and a radius eight times as large."""
    best = task.settings["sam"]
    assert best.radius is not None
    settings = replace(best, radius=FACTOR * best.radius)
    return replace(
        task,
        name=f"{task.name}-far",
        summary=f"{task.name}, for methods at {FACTOR} times SAM's best radius: {task.summary}",
        settings={"sam": settings, "monge-sam": settings},
        tuning=f"SAM's settings for {task.name}, with {FACTOR} times the radius, for both",
    )
