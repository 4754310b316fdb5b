"""Energy that a block of work took, as counted by the NVIDIA GPU."""

from typing import Self


def gpu_joules() -> float | None:
    """Joules that the current GPU has used since its driver was loaded, whoever used it; None without an NVIDIA GPU of
    the Volta generation or later. A MIG slice has no counter of its own.
    """
    import torch

    if not torch.cuda.is_available() or torch.version.hip:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        result: float | None = (
            pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")) / 1e3
        )
        return result
    except pynvml.NVMLError:
        return None


class EnergyMeter:
    """`with EnergyMeter() as meter: ...`; afterwards `meter.joules` is {"cuda": J}, or {} where nothing counted it."""

    def __enter__(self) -> Self:
        self.joules: dict[str, float] = {}
        self._begin = gpu_joules()
        return self

    def __exit__(self, *error: object) -> None:
        end = gpu_joules()
        if self._begin is not None and end is not None and end >= self._begin:  # less: the driver was loaded again
            self.joules = {"cuda": end - self._begin}
