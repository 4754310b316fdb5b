"""What this is: the card, and versions."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu.setting import Setting
from benchmarks.train_vs_trl.measure import device_name
from benchmarks.train_vs_trl.report import PACKAGES

OPTIONAL = ("triton", "liger-kernel")


def check(setting: Setting) -> str:
    versions = ", ".join(f"{name} {found}" for name in (*PACKAGES, *OPTIONAL) if (found := _version(name)))
    about = f"{device_name()}; Python {platform.python_version()}, {versions}"
    if setting.device == "cpu":
        return about
    assert torch.cuda.is_available(), f"torch finds no GPU (built for CUDA {torch.version.cuda})"
    major, minor = torch.cuda.get_device_capability()
    free, whole = torch.cuda.mem_get_info()
    memory = f"{free / 2**30:.0f} of {whole / 2**30:.0f} GiB free"
    return f"{about}; CUDA {torch.version.cuda}, compute capability {major}.{minor}, {memory}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
