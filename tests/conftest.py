"""One thread per test process: two processes on two cores, and the same sums every time."""

import os
import sys

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy is there: its threads wait by turning, and keep a core busy

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.default_generator.manual_seed(0)  # the CPU's alone: torch.manual_seed formats a stack for each other device


@pytest.fixture(autouse=True)
def _no_accelerator_left_behind():
    yield
    if "accelerate.state" in sys.modules:  # it keeps its state in the process
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
