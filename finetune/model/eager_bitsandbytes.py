"""bitsandbytes, imported without torch's compiler: to be imported before PEFT and transformers' trainer import it.

As it is imported, bitsandbytes has functions compiled for devices that it has no kernels for, and torch loads its
compiler for that: 2 of the 8 CPU seconds in which a training starts. On CPUs and CUDA nothing calls these functions,
but for weights of an odd width.
"""

import os

import torch

SWITCH = "TORCHDYNAMO_DISABLE"  # torch reads it where something is to be compiled

if not (torch.backends.mps.is_available() or torch.xpu.is_available()):
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1"
    try:
        import bitsandbytes  # noqa: F401
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before
