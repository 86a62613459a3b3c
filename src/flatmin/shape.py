"""Whether a module still consists of the same parts."""

from __future__ import annotations

from torch import nn


class Shape:
    """What a module and its parts hold, to tell later whether something was added, removed or replaced.

    Looking costs far less than walking the module, but parts that are put straight into its tables are seen too.

    Args:
        module: it is not kept alive, its parts are.
        parameters: look at the parameters too, and not at parts and the number of buffers only.
    """

    def __init__(self, module: nn.Module, *, parameters: bool = False):
        modules = list(module.modules())
        self._tables = [m._modules for m in modules] + ([m._parameters for m in modules] if parameters else [])
        self._buffers = [m._buffers for m in modules]
        self._kept = [list(table.values()) for table in self._tables]  # alive, so that no id is used again
        self._seen = self._look()

    def holds(self) -> bool:
        """Whether nothing has changed."""
        return self._look() == self._seen

    def _look(self) -> tuple[list[tuple[int, ...]], list[int]]:
        return [tuple(map(id, table.values())) for table in self._tables], list(map(len, self._buffers))
