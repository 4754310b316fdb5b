"""Joules of a GPU that isn't there, counted by a stand-in for NVML."""

import sys
from types import SimpleNamespace

import pytest
import torch

from finetune.common.energy import EnergyMeter


class NVMLError(Exception):
    pass


@pytest.mark.parametrize(
    ("millijoules", "joules"),
    [([1_000, 8_500], {"cuda": 7.5}), ([None, 5], {}), ([1_000, None], {}), ([9_000, 100], {})],
    ids=["counts", "an old GPU", "lost on the way", "set back by its driver"],
)
def test_the_gpu_counts_in_millijoules(millijoules, joules, monkeypatch):
    readings = iter(millijoules)

    def total_energy(handle: str) -> int:
        assert handle == "GPU-abc"
        if (value := next(readings)) is None:
            raise NVMLError
        return value

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=total_energy,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    with EnergyMeter() as meter:
        pass
    assert meter.joules == joules


def test_without_a_gpu_nothing_is_counted_and_errors_pass_through(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    meter = EnergyMeter()
    with pytest.raises(KeyError, match="mine"), meter:
        raise KeyError("mine")
    assert meter.joules == {}
