"""Contract 3 where every gradient is written over the last one.

Captured graphs do that, DDP's buckets, and hooks that move gradients to buffers of their own: a method that needs two
of them at once sees one of them twice, unless the first has been copied.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.contracts.cases import Case, assert_same, build, each_method, write_into


def built(method: str, *, one_memory: bool, part: bool = False, **options: Any) -> Case:
    case = Case(method)
    params = list(case.model.parameters())
    case.optimizer = build(method, case.optimizer.base, perturb=params[::2] if part else None, **options)
    for p in params if one_memory else []:
        write_into(p, torch.zeros_like(p))
    return case


@each_method
@pytest.mark.parametrize("form", ["closure", "loop"])
@pytest.mark.parametrize("part", [False, True], ids=["all", "a-part"])
@pytest.mark.parametrize("restore", ["exact", "recompute"])
def test_gradients_in_one_memory(method, form, part, restore):
    one, many = (built(method, one_memory=one, part=part, restore=restore) for one in (True, False))
    for case in (one, many):
        for _ in range(4):
            case.step() if form == "closure" else case.loop_step()
    assert_same(one.snapshot(), many.snapshot())


@each_method
def test_micro_batches_that_are_perturbed_by_themselves(method):
    one, many = (built(method, one_memory=one) for one in (True, False))
    for case in (one, many):
        for _ in range(3):
            for rows in (slice(0, 32), slice(32, 64)):
                for _probe in case.optimizer.probes(share=0.5):
                    case.loss(rows).backward()
            case.optimizer.step()
    assert_same(one.snapshot(), many.snapshot())
