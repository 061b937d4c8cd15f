"""Pooling that does not keep its input for the backward pass: max pooling keeps one byte of each output, the average
nothing. Of the input torch's own gradients read the sizes, and max pooling keeps an int64 index of each output.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .functional import needs_standard_operators

LARGEST_WINDOW = 15  # whose places fit into a byte


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d`, which keeps its input and an int64 index of each output; this keeps a uint8 of each output.

    Where the index does not fit (windows above 15, dilation), and in traced, compiled or transformed code, it is
    torch's. The results and gradients are the same bits.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The pooled (N, C, H', W') of an input (N, C, H, W)."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            y = self._small(input)
            if y is not None:
                return y
        return F.max_pool2d(  # type: ignore[call-overload]
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )

    @torch.jit.unused
    def _small(self, x: Tensor) -> Tensor | None:
        return max_pool2d(
            x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AvgPool2d(nn.AvgPool2d):
    """`torch.nn.AvgPool2d`, which keeps its input; this keeps nothing. The results and gradients are the same bits."""

    def forward(self, input: Tensor) -> Tensor:
        """The pooled (N, C, H', W') of an input (N, C, H, W)."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            y = self._small(input)
            if y is not None:
                return y
        return F.avg_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad,
            self.divisor_override,
        )  # fmt: skip

    @torch.jit.unused
    def _small(self, x: Tensor) -> Tensor | None:
        return avg_pool2d(
            x, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad,
            self.divisor_override,
        )  # fmt: skip


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    """`torch.nn.functional.max_pool2d` that keeps a uint8 of each output, or None where torch's own is called for."""
    kernel, step, border = (_one(v) for v in (kernel_size, kernel_size if _is_none(stride) else stride, padding))
    if kernel is None or step is None or border is None or _one(dilation) != 1 or return_indices:
        return None
    if not _fits(input) or kernel > min(LARGEST_WINDOW, input.size(3)):
        return None
    y: Tensor = _MaxPool.apply(input, kernel, step, border, ceil_mode)
    return y


def avg_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor | None:
    """`torch.nn.functional.avg_pool2d` that keeps nothing, or None where torch's own is called for."""
    sizes = [_two(v) for v in (kernel_size, kernel_size if _is_none(stride) else stride, padding)]
    if None in sizes or not _fits(input):
        return None
    y: Tensor = _AveragePool.apply(input, (*sizes, ceil_mode, count_include_pad, divisor_override))
    return y


def _is_none(stride: Any) -> bool:
    return stride is None or (isinstance(stride, list | tuple) and not stride)


def _two(value: Any) -> list[int] | None:
    """For both directions; None for what only torch knows how to read."""
    values = [value] if type(value) is int else list(value) if isinstance(value, list | tuple) else []
    if len(values) not in (1, 2) or any(type(each) is not int for each in values):
        return None
    return values * (2 // len(values))


def _one(value: Any) -> int | None:
    """Of a square window; None if it is not."""
    both = _two(value)
    return both[0] if both is not None and both[0] == both[1] else None


def _fits(x: Any) -> bool:
    # A tracer would record the sizes that are asked for.
    if type(x) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return False
    if not torch.is_grad_enabled() or not x.requires_grad or x.dim() != 4 or x.numel() == 0:
        return False
    return x.device.type in ("cpu", "cuda") and x.layout == torch.strided and not needs_standard_operators(x)


def _keep_sizes(ctx: Any, x: Tensor) -> None:
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    ctx.shape, ctx.format = x.shape, torch.channels_last if last else torch.contiguous_format


def _gradient(ctx: Any, operator: Any, dy: Tensor, *rest: Any) -> Tensor:
    """Of the input the operator reads nothing but its sizes: the memory of the result takes its place."""
    dx = torch.empty(ctx.shape, dtype=dy.dtype, device=dy.device, memory_format=ctx.format)
    if torch.is_grad_enabled():  # create_graph=True
        return operator(dy, dx, *rest)
    operator.grad_input(dy, dx, *rest, grad_input=dx)
    return dx


class _AveragePool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple[Any, ...]) -> Tensor:
        _keep_sizes(ctx, x)
        ctx.window = window
        y: Tensor = torch.ops.aten.avg_pool2d(x, *window)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, torch.ops.aten.avg_pool2d_backward, dy, *ctx.window), None


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: int, stride: int, padding: int, ceil_mode: bool) -> Tensor:
        y, index = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode, return_indices=True)
        _keep_sizes(ctx, x)
        ctx.window = (kernel, stride, padding, ceil_mode)
        ctx.save_for_backward(_place_in_window(index, kernel, _origins(y, x.size(3), stride, padding), x.size(3)))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        kernel, stride, padding, ceil_mode = ctx.window
        width = ctx.shape[3]
        index = _index_of_place(place, kernel, _origins(dy, width, stride, padding), width)
        window = [kernel] * 2, [stride] * 2, [padding] * 2, [1, 1], ceil_mode
        return _gradient(ctx, torch.ops.aten.max_pool2d_with_indices_backward, dy, *window, index), *(None,) * 4


def _place_in_window(index: Tensor, kernel: int, origins: Tensor, width: int) -> Tensor:
    """row·kernel + column within its window, uint8, of an index of the input, int64."""
    distance = index.to(torch.int32).sub_(origins)
    # Division in float32, several times as fast as of integers. The half keeps it away from whole numbers.
    rows = distance.to(torch.float32).add_(0.5).mul_(1 / width).to(torch.int32)
    return distance.sub_(rows, alpha=width - kernel).to(torch.uint8)


def _index_of_place(place: Tensor, kernel: int, origins: Tensor, width: int) -> Tensor:
    """The index of the input, int64, of a place in a window."""
    distance = place.to(torch.float32)
    rows = distance.add(0.5).mul_(1 / kernel).floor_()
    return distance.add_(rows, alpha=width - kernel).to(torch.int64).add_(origins)


def _origins(y: Tensor, width: int, stride: int, padding: int) -> Tensor:
    """Index in the input of the upper left corner of the window of each output, (H', W')."""
    rows, columns = (torch.arange(n, device=y.device, dtype=torch.int32) * stride - padding for n in y.shape[2:])
    return rows[:, None] * width + columns
