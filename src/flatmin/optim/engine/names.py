"""Parameters by name: whether they are still the same, and whether a saved state is theirs."""

from __future__ import annotations

from torch import Tensor, nn

CHANGED = (
    "the parameters of the model are not those that it had when the Averager was made ({how}). An average belongs to "
    "one set of parameters: make the Averager once the model has its final shape, or a new one now."
)
OTHER_MODEL = "this is the state of another model: {names} differ(s) in name or shape."


class Known:
    """The parameters of a model as they were when it was looked at.

    Attributes:
        parameters: by name, tied ones once.
    """

    def __init__(self, model: nn.Module):
        self.parameters = dict(model.named_parameters())
        self._model = model
        self._look()

    def check(self) -> None:
        """Raises a `ValueError` if parameters were added, removed or replaced."""
        if _parts(self._modules) != self._parts:
            self._compare()
            self._look()  # a module without parameters has come or gone

    def _look(self) -> None:
        # Walking a model takes as long as averaging a small one; looking at what its modules hold does not.
        self._modules = list(self._model.modules())
        self._parts = _parts(self._modules)

    def _compare(self) -> None:
        before, after = self.parameters, dict(self._model.named_parameters())
        changes = {
            "added": after.keys() - before.keys(),
            "removed": before.keys() - after.keys(),
            "replaced": {name for name in before.keys() & after.keys() if before[name] is not after[name]},
        }
        if any(changes.values()):
            how = "; ".join(f"{how}: {', '.join(sorted(names))}" for how, names in changes.items() if names)
            raise ValueError(CHANGED.format(how=how))


def matched(loaded: dict[str, Tensor], mine: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(mine, loaded) for every name; nothing if nothing was saved."""
    if not loaded:
        return []
    names = {*loaded, *mine}
    strange = [n for n in names if n not in loaded or n not in mine or loaded[n].shape != mine[n].shape]
    if strange:
        raise ValueError(OTHER_MODEL.format(names=", ".join(sorted(strange))))
    return [(mine[name], tensor) for name, tensor in loaded.items()]


def _parts(modules: list[nn.Module]) -> list[int]:
    """Which parameters and modules these modules hold; they are all kept alive, so that no id is used again."""
    return [id(part) for module in modules for held in (module._parameters, module._modules) for part in held.values()]
