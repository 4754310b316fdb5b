"""The device, the dtypes that it computes, quantized layers on it, and memory."""

import shutil
from collections.abc import Iterator
from typing import Any

from finetune.commands._doctor.finding import Diagnostic
from finetune.common.gpu import GIB, computes_bfloat16

LEAST_MEMORY = 2 * GIB  # the quickstart takes 1.3 GiB
TOLERANCE = 0.02  # relative, of a layer in bfloat16


def device() -> Iterator[Diagnostic]:
    import torch

    built = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _gpu(index, built)
        return
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        yield Diagnostic(
            "device",
            "warning",
            f"an NVIDIA driver is here, but {built} was built without CUDA",
            "install a build with CUDA: https://pytorch.org/get-started/locally",
        )
    elif shutil.which("nvidia-smi"):
        yield Diagnostic(
            "device",
            "warning",
            f"an NVIDIA driver is here, but {built}, for CUDA {torch.version.cuda}, finds no GPU",
            "see what nvidia-smi says; update the driver, or install a build of torch for its CUDA version",
        )
    if torch.backends.mps.is_available():
        yield Diagnostic("device", "ok", f"{built}: the CPU; Apple's GPU (MPS) isn't used")
    else:
        yield Diagnostic("device", "ok", f"{built}: the CPU")


def _gpu(index: int, built: str) -> Diagnostic:
    """A GPU, and whether this torch has kernels for it. float16 is what the kit takes below compute capability 8.0."""
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    name = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}, {built}"
    try:
        torch.ones(2, 2, device=f"cuda:{index}").matmul(torch.ones(2, 2, device=f"cuda:{index}")).sum().item()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return Diagnostic(
            "device", "error", f"{name}: can't compute ({reason})", "install a build of torch for this GPU and driver"
        )
    if computes_bfloat16(index):
        return Diagnostic("device", "ok", f"{name}: bfloat16")
    says = "; torch says that it has bfloat16, but emulates it" if torch.cuda.is_bf16_supported() else ""
    return Diagnostic("device", "ok", f"{name}: float16{says}", "leave model.llm.dtype: auto, or set float16")


def quantized() -> Iterator[Diagnostic]:
    """A 4-bit layer forward and backward on the device, against its own weights dequantized."""
    import bitsandbytes
    import torch

    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch_layer = torch.nn.Linear(64, 32, bias=False)
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(torch_layer.state_dict())
    layer = layer.to(where)
    packed: Any = layer.weight
    weights = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state).float()
    x = torch.linspace(-1, 1, 8 * 64, device=where).reshape(8, 64).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        pairs = [(y, x @ weights.T), (x.grad, weights.sum(0).expand(8, -1))]
        off = max(float((ours - exact).abs().max() / exact.abs().max()) for ours, exact in pairs)
    found = f"bitsandbytes {bitsandbytes.__version__}: a 4-bit layer on {where.type}"
    if off <= TOLERANCE:
        yield Diagnostic("bitsandbytes", "ok", f"{found}, forward and backward")
    else:
        yield Diagnostic("bitsandbytes", "error", f"{found} is off by {off:.0%}", REINSTALL)


REINSTALL = "pip install --force-reinstall --no-deps bitsandbytes; until it works, model.llm.quantize: none"


def memory() -> Iterator[Diagnostic]:
    import psutil

    here = psutil.virtual_memory()
    yield _free("memory", here.available, here.total)


def gpu_memory() -> Iterator[Diagnostic]:
    import torch

    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        yield _free(f"memory of GPU {index}", *torch.cuda.mem_get_info(index))


def _free(subject: str, free: int, total: int) -> Diagnostic:
    seen = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < LEAST_MEMORY:
        return Diagnostic(subject, "warning", seen, "close other programs, or restart the kernels that hold it")
    return Diagnostic(subject, "ok", seen)
