"""The lab: tasks x methods x seeds at equal gradient budget, as records, a table and a report.

    Task         data + model + loss, by name or in a file of your own
    Settings     learning rate, weight decay, radius: how a method is run on a task
    RunSpec      one training: task, method, settings, seed, number of steps
    Comparison   many runs, their summary with intervals and paired tests, and the report

The core never imports the lab.
"""

from flatmin.lab.tasks import Settings, Splits, Task

__all__ = ["Settings", "Splits", "Task"]
