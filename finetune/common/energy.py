"""Energy in joules that a block of work took, where the device counts it: NVIDIA's cards and the processor's RAPL."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class _Counter:
    """`read` gives joules counted so far, None where it can't any more; `wraps_at`: where it begins anew, in joules."""

    device: str
    read: Callable[[], float | None]
    wraps_at: float | None = None


class EnergyMeter:
    """`with EnergyMeter() as meter: ...`; then `meter.joules` is {"cpu": J, "cuda": J}, without what doesn't tell.

    "cpu": all processors of the machine, without its memory, whoever used them; Linux lets few but root read them.
    "cuda": the current card, whoever used it. A device that stops telling within the block is left out.
    """

    def __init__(self, powercap: Path = POWERCAP, every: float = 60.0) -> None:
        """`every`: seconds between two readings; a processor's counter begins anew after some minutes."""
        self.joules: dict[str, float] = {}
        self._powercap, self._every = powercap, every

    def __enter__(self) -> Self:
        self._counters = [*_packages(self._powercap), *_card()]
        first = [counter.read() for counter in self._counters]
        self._last = {counter: told for counter, told in zip(self._counters, first, strict=True) if told is not None}
        self.joules = dict.fromkeys((counter.device for counter in self._counters), 0.0)
        self._forget([counter for counter in self._counters if counter not in self._last])
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        self._add()

    def _watch(self) -> None:
        while self._last and not self._stopped.wait(self._every):
            self._add()

    def _add(self) -> None:
        for counter, before in list(self._last.items()):
            now = counter.read()
            if now is None or (now < before and counter.wraps_at is None):
                self._forget([counter])
            elif counter in self._last:
                self._last[counter] = now
                self.joules[counter.device] += now - before + (counter.wraps_at or 0.0 if now < before else 0.0)

    def _forget(self, counters: list[_Counter]) -> None:
        devices = {counter.device for counter in counters}
        self._last = {counter: told for counter, told in self._last.items() if counter.device not in devices}
        self.joules = {device: joules for device, joules in self.joules.items() if device not in devices}


def _packages(powercap: Path) -> list[_Counter]:
    """The processor's packages; some machines list one twice, by another interface."""
    found: dict[str, _Counter] = {}
    for zone in sorted(powercap.glob("*"), key=lambda zone: ("mmio" in zone.name, zone.name)):
        try:
            name = (zone / "name").read_text(encoding="ascii").strip()
            top = int((zone / "max_energy_range_uj").read_text(encoding="ascii")) / 1e6
        except (OSError, ValueError):
            continue  # not a zone that counts energy
        if name.startswith("package") and name not in found:
            found[name] = _Counter("cpu", lambda path=zone / "energy_uj": _joules_of(path), top)  # type: ignore[misc]
    return list(found.values())


def _joules_of(path: Path) -> float | None:
    try:
        return int(path.read_text(encoding="ascii")) / 1e6
    except (OSError, ValueError):
        return None


def _card() -> list[_Counter]:
    """The current NVIDIA card, from Volta on; a slice of a card doesn't count its own."""
    import torch

    if not torch.cuda.is_available() or torch.version.hip:
        return []
    import pynvml

    def read() -> float | None:
        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        except pynvml.NVMLError:
            return None

    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return []
    return [_Counter("cuda", read)]
