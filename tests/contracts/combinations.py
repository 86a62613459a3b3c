"""What goes with what, found out by doing it: every method in every situation of the suite, as a table.

The table says whether it works or is refused; what "works" means is what the contracts test.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from tests.contracts import test_sparse
from tests.contracts.cases import BASES, METHODS, MODELS, Case


def _steps(**case: object) -> Callable[[str], str]:
    def situation(method: str) -> str:
        made = Case(method, **case).run(2)  # type: ignore[arg-type]
        assert all(bool(p.isfinite().all()) for p in made.model.parameters())
        return "yes"

    return situation


def _sparse(method: str) -> str:
    dense, sparse = (test_sparse.run(method, is_sparse, "loop") for is_sparse in (False, True))
    alike = all(torch.allclose(sparse[name], p, rtol=1e-5, atol=1e-6) for name, p in dense.items())
    return "yes" if alike else "differs"


def _scaler(given: bool) -> Callable[[str], str]:
    def situation(method: str) -> str:
        case, scaler = Case(method), torch.amp.GradScaler("cpu")
        for _ in case.optimizer.probes(scaler if given else None):
            scaler.scale(case.loss()).backward()
        case.optimizer.step() if given else scaler.step(case.optimizer)
        return "yes"

    return situation


SITUATIONS: dict[str, Callable[[str], str]] = {
    **{base: _steps(base=base) for base in BASES},
    **{model: _steps(model_name=model) for model in MODELS if model != "plain"},
    "bf16 weights": _steps(dtype=torch.bfloat16),
    "sparse gradients": _sparse,
    "`probes(scaler)`": _scaler(given=True),
    "`scaler.step(opt)`": _scaler(given=False),
}


def outcome(method: str, situation: str) -> str:
    """ "yes", "refused" (a ValueError), or "differs" (from the same step on dense gradients)."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return SITUATIONS[situation](method)
        except ValueError:
            return "refused"


def table() -> str:
    """What all methods go with, and for the rest methods x situations, as Markdown."""
    found = {name: {method: outcome(method, name) for method in METHODS} for name in SITUATIONS}
    always = [name for name, outcomes in found.items() if set(outcomes.values()) == {"yes"}]
    others = [name for name in SITUATIONS if name not in always]
    lines = [f"All {len(METHODS)} methods work with: {', '.join(always)}.", ""]
    lines += ["| | " + " | ".join(others) + " |", "|---" * (len(others) + 1) + "|"]
    lines += [f"| {method} | " + " | ".join(found[name][method] for name in others) + " |" for method in METHODS]
    return "\n".join(lines)
