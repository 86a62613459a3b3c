"""Warnings that point at the user's line, and not at one of ours."""

from __future__ import annotations

import sys
import warnings

BETWEEN = ("flatmin", "torch", "contextlib", "functools")  # whose code may lie between the user's and the warning


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """`warnings.warn`, at the nearest line that is neither this library's nor torch's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
