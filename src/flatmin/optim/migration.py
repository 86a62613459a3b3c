"""Calls that other packages ask for, answered with what to write here (docs/how-to/migrate.md)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Self

from torch.optim import Optimizer

ONE_LOOP = """{name} has no {call}(): all evaluations of a step are in one loop,
    for probe in opt.probes():
        loss_fn(model(x), y).backward()
    opt.step()
or in one closure, opt.step(closure). Gradients are cleared, weights restored, and batch norm, dropout and no_sync taken
care of."""

SET_RADIUS = (
    "{name} has no {call}(): the radius is a group option. for group in opt.param_groups: group['{radius}'] = ..."
)

THE_BASE = "{name} has no {call}: the wrapped optimizer is opt.base, and opt.param_groups are its groups."

# davda54/sam and pytorch_optimizer; SamsungLabs/ASAM; the published code of NSO; juntang-zhuang/GSAM
ELSEWHERE = {
    **dict.fromkeys(("first_step", "second_step"), ONE_LOOP),
    **dict.fromkeys(("ascent_step", "descent_step"), ONE_LOOP),
    **dict.fromkeys(("store_gradients", "perturb_weights", "set_closure"), ONE_LOOP),
    **dict.fromkeys(("set_sigma", "update_rho_t"), SET_RADIUS),
    "base_optimizer": THE_BASE,
}


class Migration:
    """Mixin of the optimizers: a class where the base optimizer should be, and methods that are not here."""

    radius_name: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Because of `__new__` below, inspect and help() would show (*args, **kwargs).
        whole = inspect.signature(cls.__init__)
        cls.__signature__ = whole.replace(parameters=list(whole.parameters.values())[1:])  # type: ignore[attr-defined]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuses `SAM(params, torch.optim.SGD, rho=...)`, which Python itself would call a double `rho`."""
        positional = args[1] if len(args) > 1 else None
        base = kwargs.get("base_optimizer", positional)
        if isinstance(base, type) and issubclass(base, Optimizer):
            raise ValueError(_as_here(cls, base, {k: v for k, v in kwargs.items() if k != "base_optimizer"}))
        return super().__new__(cls)

    def __getattr__(self, name: str) -> Any:
        cls = type(self)
        answer = ELSEWHERE.get(name, "'{name}' object has no attribute '{call}'")
        raise AttributeError(answer.format(name=cls.__name__, call=name, radius=cls.radius_name), name=name, obj=self)


def _as_here(cls: type, base: type, options: Mapping[str, Any]) -> str:
    """The call with the same options, as it is written here."""
    ours = set(inspect.signature(cls).parameters) - {"options"}
    inner = ["model.parameters()", *(f"{k}={v!r}" for k, v in options.items() if k not in ours)]
    outer = [f"{k}={v!r}" for k, v in options.items() if k in ours]
    where = "torch.optim." if base.__module__.startswith("torch.optim") else ""
    call = ", ".join([f"{where}{base.__name__}({', '.join(inner)})", *outer])
    return (
        f"{cls.__name__} wraps an optimizer instance, not a class with its options. Write\n    {cls.__name__}({call})"
    )
