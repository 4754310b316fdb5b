"""Installed packages against what this distribution requires."""

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from finetune.commands._doctor.finding import Diagnostic
from finetune.common.version import DISTRIBUTION

SHOWN = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets", "huggingface_hub")
MODULES = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
EXTRAS = {
    "serve": "finetune serve",
    "gguf": "finetune export --to gguf, for tokenizers of SentencePiece",
    "label": "finetune data label --page",
    "describe": "finetune data describe --model URL",
    "dicom": "DICOM pictures",
    "quickstart": "the weights of the quickstart",
    "docs": "make docs",
}


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def requirements(extra: str = "") -> list[Requirement]:
    """Those of this distribution that hold here: without an extra, or only those that the extra adds. Raises
    PackageNotFoundError if it isn't installed.
    """
    parsed = [Requirement(line) for line in requires(DISTRIBUTION) or ()]
    wanted = [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": extra})]
    return [one for one in wanted if ("extra" in str(one.marker)) == bool(extra)]


def unmet(requirement: Requirement) -> str | None:
    """'peft 0.20.0 is installed, >=0.21.2 is required', or None."""
    found = installed(requirement.name)
    if found is None:
        return f"{requirement.name} isn't installed"
    if requirement.specifier.contains(found, prereleases=True):
        return None
    return f"{requirement.name} {found} is installed, {requirement.specifier} is required"


def python() -> Iterator[Diagnostic]:
    here = ".".join(map(str, sys.version_info[:3]))
    needed = metadata(DISTRIBUTION)["Requires-Python"] if installed(DISTRIBUTION) else ""
    if SpecifierSet(needed or "").contains(here):
        yield Diagnostic("python", "ok", f"{here}, {sys.executable}")
    else:
        yield Diagnostic("python", "error", f"{here}, {needed} is required", "make an environment with a newer Python")


def required() -> Iterator[Diagnostic]:
    if installed(DISTRIBUTION) is None:
        yield Diagnostic(
            "packages",
            "warning",
            f"{DISTRIBUTION} isn't installed, so that versions can't be compared with what it requires",
            f"pip install {DISTRIBUTION}; in a checkout: pip install -e .",
        )
        return
    wrong = [(one, problem) for one in requirements() if (problem := unmet(one))]
    for requirement, problem in wrong:
        yield Diagnostic("packages", "error", problem, f"pip install '{requirement.name}{requirement.specifier}'")
    if not wrong:
        shown = ", ".join(f"{name} {installed(name)}" for name in SHOWN)
        yield Diagnostic("packages", "ok", f"{DISTRIBUTION} {installed(DISTRIBUTION)}, {shown}")


def foreign() -> Iterator[Diagnostic]:
    """PyPI's `finetune` has a package of the same name: whichever was installed last has overwritten the other."""
    if found := installed("finetune"):
        yield Diagnostic(
            "packages",
            "warning",
            f"the distribution finetune {found} is installed too: on PyPI that is another project, with the same files",
            f"pip uninstall finetune, then pip install --force-reinstall --no-deps {DISTRIBUTION}",
        )


def replaced() -> Iterator[Diagnostic]:
    """Packages that were imported before another version was installed, as in a notebook. A mixture of both fails in
    odd ways.
    """
    names = [requirement.name for requirement in requirements()] if installed(DISTRIBUTION) else list(SHOWN)
    for name in sorted({*names, "numpy"}):
        module = sys.modules.get(MODULES.get(name.lower(), name))
        loaded, on_disk = getattr(module, "__version__", None), installed(name)
        if isinstance(loaded, str) and on_disk and Version(loaded).public != Version(on_disk).public:
            yield Diagnostic(
                name,
                "error",
                f"{loaded} is loaded, {on_disk} is installed",
                "restart the kernel (in Colab: Runtime, Restart session), then import again",
            )


def torchao() -> Iterator[Diagnostic]:
    """Found but too old, it makes PEFT refuse LoRA on layers that aren't quantized: merges, encoders."""
    from peft.import_utils import is_torchao_available

    try:
        present = is_torchao_available()
    except ImportError as error:
        yield Diagnostic("torchao", "error", f"PEFT refuses it: {error}", "pip uninstall torchao, which isn't needed")
        return
    if present:
        yield Diagnostic("torchao", "ok", f"{installed('torchao')}")


def extras() -> Iterator[Diagnostic]:
    for extra, purpose in EXTRAS.items() if installed(DISTRIBUTION) else ():
        if problems := [problem for one in requirements(extra) if (problem := unmet(one))]:
            install = f"pip install '{DISTRIBUTION}[{extra}]'"
            yield Diagnostic(
                "extras", "ok", f"optional extra {extra!r} isn't installed ({purpose}): {', '.join(problems)}", install
            )
