"""fp16: a `torch.amp.GradScaler` with several backward passes in one step.

The rule must see unscaled gradients, an overflow in any probe must skip the step, and the scaler must hear of it
once. The caller scales each loss; the rest is done here, through `scaler.unscale_`, which takes anything with
`param_groups` and keeps one overflow flag for each until `scaler.update()` asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class _Gradients:
    """The face of an optimizer: parameters whose `.grad` is to be unscaled, once."""

    def __init__(self, params: list[Tensor]):
        self.param_groups = [{"params": params}]


class Scaling:
    """The scaler of one step (`None`: gradients are not scaled)."""

    def __init__(self, scaler: Any, params: list[Tensor]):
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._params = params
        self._done: list[_Gradients] = []  # kept alive until the update: the scaler knows them by their id

    @property
    def active(self) -> bool:
        """Whether gradients are scaled."""
        return self._scaler is not None

    def unscale(self) -> None:
        """Divides the gradients that stand in `.grad` by the scale, in place, and notes an overflow."""
        if self._scaler is not None and any(p.grad is not None for p in self._params):
            gradients = _Gradients(self._params)
            self._done.append(gradients)
            self._scaler.unscale_(gradients)

    def overflowed(self, agree: Callable[[bool], bool]) -> bool:
        """Whether any unscaled gradient was not finite, on any process. One host synchronisation.

        Args:
            agree: tells whether its argument is true on any process.
        """
        if self._scaler is None:
            return False
        flags = [flag for g in self._done for flag in self._scaler._found_inf_per_device(g).values()]
        here = any(bool(flag) for flag in flags)
        anywhere = agree(here)
        if anywhere and not here:
            for flag in flags:
                flag.fill_(1.0)  # so that all scalers go down together
        return anywhere

    def update(self) -> None:
        """Lets the scaler adjust its scale, once a step."""
        if self._scaler is not None and self._done:
            self._scaler.update()
        self._done = []
