"""Ratios of CPU time in one process: every piece takes its turn in every round, so that all see the same machine.

Where the tensors of a small network happen to lie in memory changes the time of a step by several percent, for as long
as they lie there. So every few rounds all pieces are made anew.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

Piece = Callable[[], Any]
Spread = dict[str, float]

ROUNDS_PER_BUILD = 5


def interleaved(make: Callable[[], Mapping[str, Piece]], rounds: int, repeats: int) -> dict[str, np.ndarray]:
    """CPU seconds of `repeats` calls of each piece, (rounds,); first calls of what `make` has made are not timed."""
    times: dict[str, list[float]] = {}
    alive = []  # so that the next ones lie elsewhere
    for first in range(0, rounds, ROUNDS_PER_BUILD):
        pieces = make()
        alive.append(pieces)
        for piece in pieces.values():
            for _ in range(3):
                piece()
        for _ in range(first, min(first + ROUNDS_PER_BUILD, rounds)):
            for name, piece in pieces.items():
                times.setdefault(name, []).append(_seconds(piece, repeats))
    return {name: np.array(seconds) for name, seconds in times.items()}


def _seconds(piece: Piece, repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        piece()
    return time.process_time() - start


def spread(ratios: np.ndarray) -> Spread:
    """Median and quartiles."""
    low, median, high = np.percentile(ratios, [25, 50, 75])
    return {"low": float(low), "median": float(median), "high": float(high)}


def table(title: str, rows: Iterable[str], workloads: Mapping[str, Mapping[str, Spread]]) -> str:
    """Rows x workloads as Markdown: median [quartiles]; a dash where nothing was measured."""
    lines = [f"| {title} | {' | '.join(workloads)} |", "|---" * (len(workloads) + 1) + "|"]
    for row in rows:
        cells = [_cell(found[row]) if row in found else "-" for found in workloads.values()]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(ratio: Spread) -> str:
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def options(doc: str | None, out: Path, rounds: int = 41) -> argparse.ArgumentParser:
    """The command line that all benchmarks share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", type=Path, default=out)
    return parser


def write(path: Path, rounds: int, **results: Any) -> dict[str, Any]:
    """Writes the results with what they were measured on."""
    machine = f"{platform.machine()}, CPU, 1 thread"
    record = {"rounds": rounds, "torch": torch.__version__, "machine": machine, **results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    return record
