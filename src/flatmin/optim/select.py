"""Choosing parameters: what a method may move (`perturb=`)."""

from __future__ import annotations

from torch import Tensor, nn

_NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


def norm_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters of the normalisation layers of `model`: gains and biases.

    With `perturb=norm_parameters(model)` any method moves only these (and takes its norm over them), while all are
    trained. For SAM that is SAM-ON (Mueller et al., "Normalization Layers Are All That Sharpness-Aware Minimization
    Needs", NeurIPS 2023), which needs a larger rho than SAM.

    A module counts if it is one of torch's normalisations, or if its class name contains "Norm".

    Raises:
        ValueError: if there is none.

    Example:
        opt = flatmin.SAM(base, rho=0.5, perturb=flatmin.norm_parameters(model))
    """
    norms = [m for m in model.modules() if isinstance(m, _NORMS) or "Norm" in type(m).__name__]
    found: list[Tensor] = list(dict.fromkeys(p for m in norms for p in m.parameters(recurse=False)))
    if not found:
        raise ValueError(f"{type(model).__name__} has no normalisation layer with parameters.")
    return found
