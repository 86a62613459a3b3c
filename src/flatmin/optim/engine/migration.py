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
NAMES_OF_OTHERS = {
    **dict.fromkeys(("first_step", "second_step"), ONE_LOOP),
    **dict.fromkeys(("ascent_step", "descent_step"), ONE_LOOP),
    **dict.fromkeys(("store_gradients", "perturb_weights", "set_closure"), ONE_LOOP),
    **dict.fromkeys(("set_sigma", "update_rho_t"), SET_RADIUS),
    "base_optimizer": THE_BASE,
}

# Functions and classes of davda54/sam, pytorch_optimizer, PyHessian and torch.optim.swa_utils, as attributes of flatmin
NOTHING_TO_DO = "batch-norm statistics move with the first evaluation of a step only, without a call."
FUNCTIONS = {
    **dict.fromkeys(("disable_running_stats", "enable_running_stats"), NOTHING_TO_DO),
    "load_optimizer": """write
    opt = flatmin.methods()["sam"].build(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)""",
    "hessian": """write
    objective = flatmin.Objective(model, criterion, [(x, y)])    # for data=(x, y)
    objective = flatmin.Objective(model, criterion, loader)      # for dataloader=loader
where the model is (there is no cuda=), and then flatmin.trace(objective).value, .stderr;
flatmin.top_eigenvalues(objective, 2).values; flatmin.spectral_density(objective). All of it at once:
    print(flatmin.measure(model, criterion, loader))""",
    "AveragedModel": """write
    averager = flatmin.Averager(model, kind="mean")
and averager.update() after each step; with averager.applied(): ... the model has the average.""",
    "update_bn": "of an Averager, write averager.refresh(loader).",
}


def not_here(name: str) -> AttributeError:
    """The error for a name that `flatmin` does not have: what to write, if it is known from another package."""
    if name in FUNCTIONS:
        return AttributeError(f"flatmin has no {name}(): {FUNCTIONS[name]}")
    from flatmin.optim.registry import methods  # which is made of classes that need this module

    for method in methods().values():
        if method.factory is not None and name.lower().replace("_", "") == method.name.replace("-", ""):
            options = "".join(f", {key}={value!r}" for key, value in method.options.items())
            return AttributeError(f"flatmin has no {name}: write flatmin.{method.factory.__name__}(base{options})")
    return AttributeError(f"module 'flatmin' has no attribute {name!r}")


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

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name not in NAMES_OF_OTHERS]


class NotHere:
    """A name that another package has: asking for it says what to write here.

    As an attribute of the class, since a `__getattr__` makes every look-up on an instance slower, found or not.
    """

    def __init__(self, name: str, answer: str):
        self._name = name
        self._answer = answer
        self.__doc__ = "Of another package: asking for it says what to write here."

    def __get__(self, instance: Any, owner: type[Migration]) -> Any:
        answer = self._answer.format(name=owner.__name__, call=self._name, radius=owner.radius_name)
        raise AttributeError(answer, name=self._name, obj=instance)


for _name, _answer in NAMES_OF_OTHERS.items():
    setattr(Migration, _name, NotHere(_name, _answer))


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
