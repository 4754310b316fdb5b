"""This distribution's version, and its name for pip, which isn't that of the package: `finetune` on PyPI is another
project.
"""

from collections.abc import Iterable
from contextlib import suppress

DISTRIBUTION = "finetune-kit"
VERSION = "0.1.0"


def installed(packages: Iterable[str]) -> dict[str, str]:
    """{package: version} of those that are there: some are optional."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def versions(packages: Iterable[str]) -> dict[str, str]:
    """As `installed`, with this package's own, which may run from its source."""
    return {DISTRIBUTION: VERSION, **installed(packages)}
