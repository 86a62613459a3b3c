"""Processes that stay alive between tests and run one function after the other, each as a rank of a gloo group."""

from __future__ import annotations

import copy
import datetime
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch import distributed

TIMEOUT = 60.0  # seconds for one function


class Pool:
    """`pool(function, *args)` runs `function(rank, *args)` on every rank and returns the results in order."""

    def __init__(self, world_size: int = 2, timeout: float = TIMEOUT / 2):
        self.world_size = world_size
        self.timeout = timeout  # of a collective
        self._ends: list[Connection] = []
        self._processes: list[Any] = []

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        if not self._processes:
            self._start()
        for end in self._ends:
            end.send((function, args))
        answers = []
        for rank, end in enumerate(self._ends):
            if not end.poll(TIMEOUT):
                self.stop()
                raise AssertionError(f"rank {rank} hangs in {function.__name__}{args}")
            try:
                answers.append(end.recv())
            except EOFError:
                answers.append((True, "dead"))
        failed = [(rank, text) for rank, (good, text) in enumerate(answers) if not good]
        if failed:
            if len(failed) < self.world_size:
                self.stop()  # the others may wait for what will not come
            raise AssertionError("\n".join(f"rank {rank}: {text}" for rank, text in failed))
        return [value for _, value in answers]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._ends = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = os.path.join(tempfile.mkdtemp(), "store")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.world_size, store, self.timeout), daemon=True
            )
            process.start()
            theirs.close()  # so that the end of a process is the end of its pipe
            self._ends.append(ours)
            self._processes.append(process)


def _serve(end: Connection, rank: int, world_size: int, store: str, timeout: float) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    while True:
        function, args = end.recv()
        torch.manual_seed(0)
        try:
            end.send((True, function(rank, *copy.deepcopy(args))))  # tensors arrive in memory that ranks share
        except (Exception, pytest.fail.Exception):  # what pytest.raises raises is no Exception
            end.send((False, traceback.format_exc()))
