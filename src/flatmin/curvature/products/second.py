"""Operations with a second derivative that torch puts together from slow pieces, and a better one for each.

    convolution     torch takes the derivative by the weight as a convolution with a kernel as large as the image
    batch norm      by its running statistics it is affine; torch uses the formula of training, 26 kernels for our 9
    layer norm      77 kernels in torch 2.13; here 24, three of them torch's own first derivative
    GELU, SiLU      some ten kernels, each with new memory; here most are in place

Values and first derivatives are torch's own kernels: losses and gradients are the user's, bit for bit. The gradient of
y = f(x; w, b) is a function of its own, g -> (g_x, g_w, g_b), whose derivative is given here: that of
<v_x, g_x> + <v_w, g_w> + <v_b, g_b>, for cotangents v of the three,

                    by g                            by x                                by w
    convolution     w * v_x + v_w * x + v_b         g_x of v_w * x, along g             g_w of w * v_x, along g
    batch norm      v_x w / s + v_w z + v_b         g v_w / s                           sum of v_x g / s
    layer norm      w P v_x + v_w z + v_b           see `_LayerNormGradient`            sum of g P v_x
    GELU, SiLU      v_x f'(x)                       v_x g f''(x)

where * is the convolution, s the deviation, z = (x - mean) / s, and P = dz / dx, a symmetric matrix for each row:
P u = (u - mean(u) - z mean(u z)) / s. There is no third derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Given = Tensor | None
aten = torch.ops.aten


def _last() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("a third derivative was asked for, and there is none here")


def _by_channel(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers.view(-1, *[1] * (like.ndim - 2))


class Convolution(Function):
    """x (n, channels, ...), w, b, and the further arguments of `torch.convolution` as a tuple."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Given, options: tuple[Any, ...]) -> Tensor:
        """The convolution."""
        ctx.save_for_backward(x, w)
        ctx.options = options
        return torch.convolution(x, w, b, *options)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Given, ...]:  # type: ignore[override]
        """Its gradient."""
        return (*_ConvolutionGradient.apply(g, *ctx.saved_tensors, ctx.options, ctx.needs_input_grad[:3]), None)


class _ConvolutionGradient(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, options: tuple[Any, ...], needed: Sequence[bool]) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, w)
        ctx.options = options
        return aten.convolution_backward.default(g, x, w, [len(w)], *options, list(needed))

    @staticmethod
    def backward(ctx: Any, vx: Given, vw: Given, vb: Given) -> tuple[Given, ...]:  # type: ignore[override]
        _last()
        (g, x, w), options, gradient = ctx.saved_tensors, ctx.options, aten.convolution_backward.default
        by_g = by_x = by_w = None
        if vw is not None or vb is not None:
            vw = torch.zeros_like(w) if vw is None else vw
            by_g = torch.convolution(x, vw, vb, *options)
            if ctx.needs_input_grad[1]:
                by_x = gradient(g, x, vw, None, *options, [True, False, False])[0]
        if vx is not None:
            along = torch.convolution(vx, w, None, *options)
            by_g = along if by_g is None else by_g.add_(along)
            if ctx.needs_input_grad[2]:
                by_w = gradient(g, vx, w, None, *options, [False, True, False])[1]
        return by_g, by_x, by_w, None, None


class BatchNorm(Function):
    """x (n, channels, ...), w and b (or none), running mean and variance, eps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Given, b: Given, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
        """The normalised x, by the running statistics."""
        ctx.save_for_backward(x, w, mean, variance)
        ctx.eps = eps
        return torch.batch_norm(x, w, b, mean, variance, False, 0.0, eps, torch.backends.cudnn.enabled)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Given, ...]:  # type: ignore[override]
        """Its gradient."""
        found = _BatchNormGradient.apply(g, *ctx.saved_tensors, ctx.eps, ctx.needs_input_grad[:3])
        return (*found, None, None, None)


class _BatchNormGradient(Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Given, mean: Tensor, variance: Tensor, eps: float, needed: Sequence[bool]
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, w, mean, variance)
        ctx.eps = eps
        return _channels_gradient(g, x, w, mean, variance, eps, needed)

    @staticmethod
    def backward(ctx: Any, vx: Given, vw: Given, vb: Given) -> tuple[Given, ...]:  # type: ignore[override]
        _last()
        (g, x, w, mean, variance), eps = ctx.saved_tensors, ctx.eps
        inverse = (variance + eps).rsqrt()
        by_g = by_x = by_w = None
        if vw is not None or vb is not None:
            vw = torch.zeros_like(mean) if vw is None else vw
            by_g = torch.batch_norm(x, vw, vb, mean, variance, False, 0.0, eps, False)
            if ctx.needs_input_grad[1]:
                by_x = g * _by_channel(vw * inverse, x)
        if vx is not None:
            scale = _by_channel(inverse if w is None else w * inverse, x)
            by_g = vx * scale if by_g is None else by_g.addcmul_(vx, scale)
            if ctx.needs_input_grad[2]:
                zero = torch.zeros_like(mean)
                by_w = _channels_gradient(vx, g, w, zero, variance, eps, (False, True, False))[1]
        return by_g, by_x, by_w, None, None, None, None


def _channels_gradient(
    g: Tensor, x: Tensor, w: Given, mean: Tensor, variance: Tensor, eps: float, needed: Sequence[bool]
) -> tuple[Tensor, ...]:
    """`g w / s`, and the sums of `g (x - mean) / s` and of `g` over each channel, as needed."""
    return aten.native_batch_norm_backward.default(g, x, w, mean, variance, None, None, False, eps, list(needed))


class LayerNorm(Function):
    """x (n, d), w and b (d,) or none, eps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Given, b: Given, eps: float) -> Tensor:
        """The normalised rows of x."""
        y, mean, inverse = torch.native_layer_norm(x, x.shape[1:], w, b, eps)
        ctx.save_for_backward(x, w, mean, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Given, ...]:  # type: ignore[override]
        """Its gradient."""
        return (*_LayerNormGradient.apply(g, *ctx.saved_tensors, ctx.needs_input_grad[:3]), None)


class _LayerNormGradient(Function):
    """The gradient of the normalised rows: with c = g w it is g_x = P c, and g_w is the sum of g z.

    Since z and s depend on x (dz / dx = P, ds / dx = z / d), the derivative of <v_x, g_x> by x is, for each row,

        P u - S z / (s d),    u = -(mean(v_x z) c + mean(c z) v_x) / s,    S = <v_x, P c>

    and that of <v_w, g_w> is P (g v_w).
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Given, mean: Tensor, inverse: Tensor, needed: Sequence[bool]) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, w, mean, inverse)
        return _rows_gradient(g, x, w, mean, inverse, needed)

    @staticmethod
    def backward(ctx: Any, vx: Given, vw: Given, vb: Given) -> tuple[Given, ...]:  # type: ignore[override]
        _last()
        g, x, w, mean, inverse = ctx.saved_tensors
        z, d = (x - mean).mul_(inverse), x.shape[1]
        by_g = by_w = bent = along = None
        if vw is not None or vb is not None:
            vw = torch.zeros_like(z[0]) if vw is None else vw
            by_g = z * vw if vb is None else torch.addcmul(vb, z, vw)
            bent = g * vw
        if vx is not None:
            c = g if w is None else g * w
            pulled = _rows_gradient(vx, x, None, mean, inverse, (True, False, False))[0]
            if by_g is None:
                by_g = pulled.clone() if w is None else pulled * w
            else:
                by_g = by_g.add_(pulled) if w is None else by_g.addcmul_(pulled, w)
            if ctx.needs_input_grad[2]:
                zero, one = torch.zeros_like(mean), torch.ones_like(inverse)
                by_w = _rows_gradient(g, pulled, w, zero, one, (False, True, False))[1]
            share = inverse / -d
            along = _dots(pulled, c).mul_(share)
            bent = torch.zeros_like(g) if bent is None else bent
            bent.addcmul_(c, _dots(vx, z).mul_(share)).addcmul_(vx, _dots(c, z).mul_(share))
        by_x = None
        if bent is not None and ctx.needs_input_grad[1]:
            by_x = _rows_gradient(bent, x, None, mean, inverse, (True, False, False))[0]
            by_x = by_x if along is None else by_x.addcmul_(z, along)
        return by_g, by_x, by_w, None, None, None


def _rows_gradient(
    g: Tensor, x: Tensor, w: Given, mean: Tensor, inverse: Tensor, needed: Sequence[bool]
) -> tuple[Tensor, ...]:
    """`P (g w)`, and the sums of `g z` and of `g` over the rows, as needed."""
    bias = w if needed[2] else None
    return aten.native_layer_norm_backward.default(g, x, x.shape[1:], mean, inverse, w, bias, list(needed))


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows: (n, 1)."""
    return torch.linalg.vecdot(a, b).unsqueeze(1)


class Pointwise(Function):
    """x, and the name of a function in SECOND."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: str) -> Tensor:
        """The values."""
        ctx.save_for_backward(x)
        ctx.function = function
        return getattr(aten, function)(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Given, ...]:  # type: ignore[override]
        """Their gradient."""
        return _PointwiseGradient.apply(g, *ctx.saved_tensors, ctx.function), None


class _PointwiseGradient(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, function: str) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.function = function
        return getattr(aten, f"{function}_backward")(g, x)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Given, ...]:  # type: ignore[override]
        _last()
        g, x = ctx.saved_tensors
        by_x = SECOND[ctx.function](x).mul_(v).mul_(g) if ctx.needs_input_grad[1] else None
        return getattr(aten, f"{ctx.function}_backward")(v, x), by_x, None


def _gelu(x: Tensor) -> Tensor:
    """The second derivative (2 - x^2) phi(x), with phi the normal density."""
    square = x * x
    density = torch.mul(square, -0.5).exp_()
    return square.sub_(2.0).mul_(density).mul_(-1.0 / math.sqrt(2.0 * math.pi))


def _silu(x: Tensor) -> Tensor:
    """The second derivative s (1 - s) (2 + x (1 - 2 s)), with s the sigmoid of x."""
    s = torch.sigmoid(x)
    bend = torch.mul(s, -2.0).add_(1.0).mul_(x).add_(2.0)
    return bend.mul_(s).mul_(s.neg_().add_(1.0))


SECOND: dict[str, Callable[[Tensor], Tensor]] = {"gelu": _gelu, "silu": _silu}
