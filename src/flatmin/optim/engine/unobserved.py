"""The base optimizer's step without what is there for observers only, where nobody observes.

torch wraps the `step` of every optimizer class: a block for the profiler around it, and hooks before and after it. On a
network of a few thousand weights opening that block takes as long as a tenth of two passes, profiler or not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

# All wrappers that torch makes share their code, which tells them from what others may have put in their place.
_WRAPPER = Optimizer.profile_hook_step(lambda _: None).__code__


def step(base: Optimizer) -> None:
    """`base.step()`; where no profiler runs and no hook waits, what torch has wrapped is called directly."""
    wrapped: Any = type(base).step
    if (
        "step" in base.__dict__  # a scheduler, or somebody else, has a step of their own
        or getattr(wrapped, "__code__", None) is not _WRAPPER
        or base._optimizer_step_pre_hooks
        or base._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or torch.autograd._profiler_enabled()
    ):
        base.step()
    else:
        wrapped.__wrapped__(base)
