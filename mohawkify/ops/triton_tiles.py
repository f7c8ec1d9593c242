"""What the Triton kernels share: the precision of products and the width of tiles."""

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


def float32_products() -> str:
    """How float32 products are made: in TensorFloat-32 where torch is allowed to, else to float32's precision."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def tile_width(width: int) -> int:
    """The narrowest tile that holds a width."""
    return max(triton.next_power_of_2(width), SMALLEST_TILE)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Within the block kernels start on the tensor's GPU; Triton would use the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
