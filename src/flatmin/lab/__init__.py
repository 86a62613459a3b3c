"""The lab: tasks x methods x seeds at equal gradient budget, as records, a table and a report.

    Task         data + model + loss, by name (flatmin.lab.tasks)
    Settings     learning rate, weight decay, radius: how a method is run on a task
    RunSpec      one training: task, method, settings, seed, number of steps
    Comparison   many runs, their summary with intervals and paired tests, and the report

The core never imports the lab.
"""
