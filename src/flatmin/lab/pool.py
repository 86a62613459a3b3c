"""Many runs at once, one process and one thread each, with progress and a clean stop.

Workers ignore Ctrl-C; the parent tells them to stop, and each leaves its run at the next step with whole records. A
worker whose parent has died ends at once.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

from flatmin.lab.train import RunSpec, train

IF_STOPPED = "Finished runs are kept; the same command continues."

_shared: dict[str, Any] = {}


class Watcher(Protocol):
    """Who is told how the runs are going."""

    def update(self, name: str, step: int, num_steps: int, loss: float) -> None:
        """A run has come to `step`."""
        ...

    def done(self, name: str) -> None:
        """A run is finished."""
        ...

    def stopping(self) -> None:
        """Those under way are ending."""
        ...


def run_all(runs: Sequence[tuple[RunSpec, Path]], jobs: int, watcher: Watcher) -> None:
    """Trains every spec into its folder.

    Raises:
        KeyboardInterrupt: after all workers have stopped; what is finished is on disk.
        BrokenProcessPool: if a worker was killed.
    """
    if not runs:
        return
    if jobs == 1:
        for spec, folder in runs:
            train(spec, folder, watcher.update)
            watcher.done(spec.name)
        return
    context = multiprocessing.get_context("spawn")
    messages, stop = context.Queue(), context.Event()
    with ProcessPoolExecutor(min(jobs, len(runs)), context, _initialize, (messages, stop)) as pool:
        with _ignoring_interrupts():  # inherited by the workers, which are started here
            futures = {pool.submit(_work, spec, folder): spec.name for spec, folder in runs}
        try:
            _watch(futures, messages, watcher)
        except BaseException:
            stop.set()
            watcher.stopping()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _watch(futures: dict[Future[None], str], messages: Any, watcher: Watcher) -> None:
    left = dict(futures)
    while left:
        try:
            watcher.update(*messages.get(timeout=0.1))
        except queue.Empty:
            for future in [f for f in left if f.done()]:
                future.result()
                watcher.done(left.pop(future))


def check_importing() -> None:
    """Refuses to begin while a worker imports the script that began it: it would begin everything again."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ValueError(
            "this script starts runs as soon as it is imported, and the processes that train import it. Put the call "
            'below `if __name__ == "__main__":`, or use jobs=1.'
        )


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _initialize(messages: Any, stop: Any) -> None:
    _shared.update(messages=messages, stop=stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot say stop. Lines of a record are written whole, so to end anywhere leaves whole ones."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(spec: RunSpec, folder: Path) -> None:
    train(spec, folder, _report)


def _report(name: str, step: int, num_steps: int, loss: float) -> None:
    if _shared["stop"].is_set():
        raise KeyboardInterrupt
    _shared["messages"].put((name, step, num_steps, loss))
