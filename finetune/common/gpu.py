"""What GPUs hold and compute."""

GIB = 2**30  # bytes


def computes_bfloat16(index: int = 0) -> bool:
    """Of a CUDA device. Turing answers yes to is_bf16_supported(), by emulation, many times slower than float16."""
    import torch

    return torch.cuda.get_device_capability(index) >= (8, 0)
