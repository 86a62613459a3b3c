"""What is said where displaced weights have a loss that is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flatmin.curvature.function.objective import NotFinite


@contextmanager
def displaced_by(what: str) -> Iterator[None]:
    """Inside, a loss that is not finite says what to make smaller; other errors, as the model's own, are left alone."""
    try:
        yield
    except NotFinite as error:
        error.add_note(f"The weights were displaced: with a smaller {what} the loss may be finite.")
        raise
