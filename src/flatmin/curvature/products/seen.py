"""What a kept graph was made of, to see whether it is still there.

Version counters are not enough: fused optimizers and whoever writes through `.data` count no version. So the bits of
all parameters and buffers are added up too, which takes a thousandth of a product.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def seen(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """Something that differs if one of the tensors lies elsewhere, was written to, or has other bits.

    Cost: one synchronisation. Two different sets of bits with the same sum are possible, if not by chance.
    """
    plain = [t.detach() for t in tensors if t.layout is torch.strided]
    places = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in plain)
    sums = [_bits(t) for t in plain if t.numel() and t.element_size() in (*INTEGERS, 16)]
    return places, tuple(torch.stack([s.to(sums[0].device) for s in sums]).tolist() if sums else ())


def _bits(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
