"""Accelerate: the loop form with a prepared optimizer, in any mixed precision, with accumulation.

    model, opt, loader, scheduler = accelerator.prepare(model, opt, loader, scheduler)
    for window in windows(accelerator, model, loader):  # gradient_accumulation_steps micro-batches
        for _probe in probes(accelerator, opt):
            for inputs, labels in window:
                accelerator.backward(loss_fn(model(inputs), labels))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        scheduler.step()

`accelerator.accumulate(model)` cannot be used with a method that evaluates a batch twice: its micro-batches are gone
when the second evaluation is due. A closure, `opt.step(closure)`, works without a scaler; with fp16 Accelerate hands it
to the scaler past torch's own check, and flatmin raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

from torch import nn

from flatmin.integrations.unwrap import flat_optimizer
from flatmin.optim.rule import Probe


def probes(accelerator: Any, optimizer: Any, *, share: float | None = None) -> Iterator[Probe]:
    """The probes of one step of a prepared optimizer; `optimizer.step()` after the loop, as usual.

    The body calls `accelerator.backward(loss)`. Between the loop and the step the gradients are the direction, scaled
    in fp16, so that `accelerator.clip_grad_norm_` and `clip_grad_value_` do what they always do. An overflow in any
    probe skips the step, and the scheduler's.

    Args:
        accelerator: the `accelerate.Accelerator`.
        optimizer: a flatmin optimizer, or what `accelerator.prepare` made of it.
        share: to perturb each micro-batch by itself, see `FlatOptimizer.probes`. `accelerator.backward` divides the
            loss by `gradient_accumulation_steps`: leave that at 1 then.

    Yields: a `Probe` for each evaluation, with the weights displaced until the next one is asked for.

    Raises:
        ValueError: if the optimizer is not one of flatmin's, and whatever `FlatOptimizer.probes` raises.
    """
    flat = flat_optimizer(optimizer, "probes(accelerator, optimizer)")
    return flat.probes(accelerator.scaler, share=share, rescale=True)


class MicroBatches:
    """The micro-batches of one step; can be iterated as often as there are probes.

    Between processes gradients are reduced on the last one only.
    """

    def __init__(self, accelerator: Any, model: nn.Module, batches: list[Any]):
        self._accelerator = accelerator
        self._model = model
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self._batches, 1):
            last = number == len(self._batches)
            with nullcontext() if last else self._accelerator.no_sync(self._model):
                yield batch


def windows(accelerator: Any, model: nn.Module, loader: Iterable[Any]) -> Iterator[MicroBatches]:
    """Groups the batches of a prepared loader by `gradient_accumulation_steps`; the last group may be smaller.

    Args:
        accelerator: the `accelerate.Accelerator`.
        model: the prepared model, whose gradients need no reduction before the last micro-batch.
        loader: the prepared loader.

    Yields: `MicroBatches`, to be iterated once for each probe. Memory: the batches of one group.
    """
    batches = iter(loader)
    while window := list(islice(batches, accelerator.gradient_accumulation_steps)):
        yield MicroBatches(accelerator, model, window)
