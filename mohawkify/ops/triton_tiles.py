"""Shared by the Triton kernels: the precision of products, the size of tiles, their grid, the shape of a mask."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
SMALLEST_TILE = 16  # of a product on tensor cores


def product_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype products run in: autocast's where it is on, as in any product of matrices, else the inputs' widest."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor as kernels read it: contiguous, and in the products' dtype.

    Under autocast inputs come in float32, as the convolution's taps are. Tiles are sized for the products' dtype; read
    in float32 they would take twice the shared memory, more than GPUs with 99 KB have, and spill.
    """
    return tensor.to(dtype).contiguous()


def float32_products() -> str:
    """How float32 products are made: in TensorFloat-32 where torch is allowed to, else to float32's precision."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def tile_width(width: int) -> int:
    """The narrowest tile that holds a width."""
    return max(triton.next_power_of_2(width), SMALLEST_TILE)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Within the block kernels start on the tensor's GPU; Triton would use the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def grid(num_parts: int, num_pairs: int) -> tuple[int]:
    """A program for every part of every pair of batch and head, on one axis: the second ends at 65,535 on CUDA."""
    return (num_parts * num_pairs,)


@triton.jit
def place(num_parts: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """A program's part, and its pair of batch and head, in a `grid`."""
    program = tl.program_id(0)
    return program % num_parts, (program // num_parts).to(tl.int64)


def describe_mask(mask_bhls: Tensor) -> tuple[Tensor, Tensor | None]:
    """The first source that each target may attend to, and the mask itself only if it is more than that.

    A causal mask, windowed and within documents or not, allows every source from the first one on to the target. Then
    the kernels compare positions and never read the mask.

    Args:
        mask_bhls: true where attention is allowed, nowhere after the target; broadcastable.

    Returns:
        The first sources, int32, broadcastable to (b, h, l), and the mask as uint8 or None. Waits for the device.
    """
    mask_bhls = mask_bhls.view((1,) * (4 - mask_bhls.dim()) + mask_bhls.shape).view(torch.uint8)
    first_bhl = mask_bhls.argmax(-1)
    targets = torch.arange(mask_bhls.shape[-2], device=mask_bhls.device)
    is_interval = (mask_bhls.sum(-1) == targets - first_bhl + 1).all()
    first_bhl = first_bhl.to(torch.int32).contiguous()
    return (first_bhl, None) if is_interval else (torch.zeros_like(first_bhl), mask_bhls)


def square_tiles(p_width: int, n_width: int, dtype: torch.dtype) -> tuple[int, int]:
    """The positions that a program owns and those it visits at a time, so that all fit a GPU's shared memory."""
    number_bytes = (tile_width(p_width) + tile_width(n_width)) * dtype.itemsize
    if dtype != torch.float32 and number_bytes <= 512:
        return (128, 64) if number_bytes <= 256 else (64, 64)
    return (32, 32) if number_bytes <= 1024 else (16, 16)
