"""Mixup: training on convex combinations of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from flatmin.checks import check_positive


def mixup(inputs: Tensor, targets: Tensor, num_classes: int | None = None, alpha: float = 0.2) -> tuple[Tensor, Tensor]:
    """X' = l x + (1 - l) x[perm], and the same for the targets; l ~ Beta(alpha, alpha), one for the batch.

    It draws from torch's global random state: inside the body of `probes()` (or a closure) all probes of a step see
    the same mix, as they see the same dropout masks.

    Args:
        inputs: floating-point samples, (n, ...).
        targets: labels (n,), which need `num_classes` and become probabilities (n, num_classes), as `cross_entropy`
            takes them; or floating-point targets (n, ...).
        num_classes: of integer labels.
        alpha: > 0; small values mix little. 0.2 is common.

    Returns:
        Mixed inputs and targets.

    Raises:
        ValueError: integer labels without `num_classes`, or alpha that is not positive.

    Source: Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
    """
    check_positive("alpha", alpha)
    if not targets.is_floating_point():
        if num_classes is None:
            raise ValueError("integer labels are mixed as probabilities: say num_classes.")
        targets = torch.nn.functional.one_hot(targets, num_classes).to(inputs.dtype)
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    order = torch.randperm(len(inputs), device=inputs.device)
    return torch.lerp(inputs[order], inputs, share), torch.lerp(targets[order], targets, share)
