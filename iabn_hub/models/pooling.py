"""Max pooling that keeps one byte of each output for its backward pass."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.functional import needs_standard_operators


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d`, which keeps its input and an int64 index of each output; this keeps a uint8 of each output.

    Where the index does not fit (windows above 15, dilation), and in traced, compiled or transformed code, it is
    torch's. The results and gradients are the same bits.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The pooled (N, C, H', W') of an input (N, C, H, W)."""
        if torch.jit.is_scripting() or not self._fits(input):  # type: ignore[attr-defined]
            return F.max_pool2d(  # type: ignore[call-overload]
                input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
            )
        return self._small(input)

    @torch.jit.unused
    def _fits(self, x: Any) -> bool:
        # A tracer would record the sizes that are asked for below.
        if not isinstance(x, Tensor) or torch.compiler.is_compiling() or torch._C._get_tracing_state():
            return False
        if not torch.is_grad_enabled() or not x.requires_grad or x.dim() != 4 or x.numel() == 0:
            return False
        kernel: Any = self.kernel_size
        sizes = isinstance(kernel, int) and isinstance(self.stride, int) and isinstance(self.padding, int)
        if not sizes or self.dilation != 1 or self.return_indices or kernel > min(15, x.size(3)):
            return False
        return not needs_standard_operators(x)

    @torch.jit.unused
    def _small(self, x: Tensor) -> Tensor:
        y: Tensor = MaxPool.apply(x, self.kernel_size, self.stride, self.padding, self.ceil_mode)
        return y


class MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: int, stride: int, padding: int, ceil_mode: bool) -> Tensor:
        y, index = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode, return_indices=True)
        ctx.shape, ctx.window = x.shape, (kernel, stride, padding, 1, ceil_mode)
        last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        ctx.format = torch.channels_last if last else torch.contiguous_format
        ctx.save_for_backward(_place_in_window(index, kernel, _origins(y, x.size(3), stride, padding), x.size(3)))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        kernel, stride, padding, *_ = ctx.window
        width = ctx.shape[3]
        index = _index_of_place(place, kernel, _origins(dy, width, stride, padding), width)
        # Of the input the operator reads nothing but its sizes.
        dx = torch.empty(ctx.shape, dtype=dy.dtype, device=dy.device, memory_format=ctx.format)
        pool_backward = torch.ops.aten.max_pool2d_with_indices_backward
        if torch.is_grad_enabled():  # create_graph=True
            dx = pool_backward(dy, dx, [kernel] * 2, [stride] * 2, [padding] * 2, [1, 1], ctx.window[4], index)
        else:
            pool_backward.grad_input(
                dy, dx, [kernel] * 2, [stride] * 2, [padding] * 2, [1, 1], ctx.window[4], index, grad_input=dx
            )
        return dx, None, None, None, None


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
