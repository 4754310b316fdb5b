"""What GPUs hold and compute."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 2**30  # bytes


def computes_bfloat16(device: "torch.device | int" = 0) -> bool:
    """Whether a CUDA device has units for it. Turing answers yes to is_bf16_supported(), by emulation, many times
    slower than float16.
    """
    import torch

    return torch.cuda.get_device_capability(device) >= (8, 0)
