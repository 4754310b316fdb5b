"""Joules against counters that are written by hand: a folder like /sys/class/powercap, and a card that isn't there."""

import sys
import time
from types import SimpleNamespace

import pytest

from finetune.common.energy import EnergyMeter

TOP = 262_143_328_850  # microjoules; what many processors count up to


def zone(folder, name: str, label: str, microjoules: int, top: int = TOP):
    path = folder / name
    path.mkdir(parents=True)
    (path / "name").write_text(f"{label}\n")
    (path / "max_energy_range_uj").write_text(f"{top}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path / "energy_uj"


def test_packages_are_added_up_and_nothing_inside_them(tmp_path):
    first = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 100)
    others = [
        zone(tmp_path, "intel-rapl:0:0", "core", 0),
        zone(tmp_path, "intel-rapl:2", "psys", 0),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0),
    ]
    (tmp_path / "intel-rapl").mkdir()
    with EnergyMeter(tmp_path) as meter:
        first.write_text("7500000\n")
        second.write_text("1000100\n")
        for other in others:
            other.write_text("99000000\n")
    assert meter.joules == pytest.approx({"cpu": 2.5 + 1.0})


def test_a_counter_that_begins_anew_goes_on(tmp_path):
    counter = zone(tmp_path, "intel-rapl:0", "package-0", TOP - 3_000_000)
    with EnergyMeter(tmp_path) as meter:
        counter.write_text("4000000\n")
    assert meter.joules == pytest.approx({"cpu": 7.0})


def test_a_long_block_is_read_in_between(tmp_path):
    """Round the counter twice: more than the first and the last reading can tell."""
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0, top=10_000_000)
    with EnergyMeter(tmp_path, every=0.005) as meter:
        told = 0.0
        for microjoules in (6, 2, 8, 4):  # 6 + 6 + 6 + 6 joules
            counter.write_text(f"{microjoules}000000\n")
            told += 6
            until = time.monotonic() + 10
            while meter.joules["cpu"] < told - 0.1 and time.monotonic() < until:
                time.sleep(0.002)
    assert meter.joules == pytest.approx({"cpu": 24.0})


def test_what_does_not_tell_is_left_out(tmp_path):
    with EnergyMeter(tmp_path / "nothing") as meter:
        pass
    assert meter.joules == {}
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    counter.unlink()
    with EnergyMeter(tmp_path) as meter:
        pass
    assert meter.joules == {}
    first, _ = zone(tmp_path, "intel-rapl:1", "package-1", 0), zone(tmp_path, "intel-rapl:2", "package-2", 0)
    with EnergyMeter(tmp_path) as meter:
        first.write_text("broken")
    assert meter.joules == {}


def test_an_error_of_the_block_goes_through_and_the_meter_stops(tmp_path):
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = EnergyMeter(tmp_path)
    with pytest.raises(KeyError, match="mine"), meter:
        counter.write_text("1000000")
        raise KeyError("mine")
    assert meter.joules == pytest.approx({"cpu": 1.0}) and not meter._thread.is_alive()
    with meter:
        counter.write_text("3000000")
    assert meter.joules == pytest.approx({"cpu": 2.0})


class NVMLError(Exception):
    pass


def card(monkeypatch, millijoules: list) -> None:
    """A card whose counter gives these values one after the other; an error where it is None."""
    import torch

    left = iter(millijoules)

    def told(handle: str) -> int:
        assert handle == "GPU-abc"
        value = next(left)
        if value is None:
            raise NVMLError
        return value

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=told,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))


@pytest.mark.parametrize(
    "millijoules, joules",
    [([1_000, 8_500], {"cuda": 7.5}), ([None, 5], {}), ([1_000, None], {}), ([9_000, 100], {})],
    ids=["counts", "an old card", "lost on the way", "set back by its driver"],
)
def test_a_card_counts_in_millijoules(tmp_path, monkeypatch, millijoules, joules):
    card(monkeypatch, millijoules)
    with EnergyMeter(tmp_path) as meter:
        pass
    assert meter.joules == joules
