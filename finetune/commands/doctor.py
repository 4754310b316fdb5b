"""Doctor: what in this environment would stop a run, and what fixes it."""

from dataclasses import dataclass

from finetune.commands._doctor import device, packages, surroundings
from finetune.commands._doctor.finding import Check, Diagnostic
from finetune.common import display
from finetune.common.version import DISTRIBUTION

INSTALL = f"pip install {DISTRIBUTION}"
CHECKS = (
    Check("python", packages.python, INSTALL),
    Check("packages", packages.required, INSTALL),
    Check("packages", packages.foreign, INSTALL),
    Check("packages", packages.replaced, "restart the kernel"),
    Check("extras", packages.extras, INSTALL),
    Check("device", device.device, "install torch again: https://pytorch.org/get-started/locally"),
    Check("torchao", packages.torchao, "fix what is above, then pip install --force-reinstall --no-deps peft"),
    Check("bitsandbytes", device.quantized, device.REINSTALL),
    Check("memory", device.memory, "pip install --force-reinstall --no-deps psutil"),
    Check("memory of GPUs", device.gpu_memory, "install torch again: https://pytorch.org/get-started/locally"),
    Check("disk", surroundings.disk, "work in a folder that exists and can be read"),
    Check("hub", surroundings.hub, "check the connection"),
    Check("codecs", surroundings.codecs, "pip install --force-reinstall --no-deps av"),
    Check("engines", surroundings.engines, "name an engine that works, or unset its variable"),
)


@dataclass(frozen=True, repr=False)
class Diagnosis:
    diagnostics: tuple[Diagnostic, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing is an error."""
        return all(diagnostic.level != "error" for diagnostic in self.diagnostics)

    def _repr_html_(self) -> str:
        return display.preformatted(str(self))

    def __str__(self) -> str:
        lines = []
        for diagnostic in self.diagnostics:
            lines.append(f"{diagnostic.level:<8} {diagnostic.subject}: {diagnostic.seen}")
            if diagnostic.fix:
                lines.append(f"{'':<8}   {diagnostic.fix}")
        return "\n".join(lines)

    __repr__ = __str__


def doctor() -> Diagnosis:
    """Examine versions, device, quantized layers, memory, disks, the Hub, codecs and engines. Raises nothing: a check
    that fails is an error in the diagnosis.
    """
    return Diagnosis(tuple(diagnostic for check in CHECKS for diagnostic in check.diagnostics()))
