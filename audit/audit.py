"""What the kit is built from, audited: `make audit`, or `python audit/audit.py [--advisories FOLDER]`.

lock.txt holds every package at the version that the tests ran with, with hashes. Written are licences.md beside it,
each with a judgement, and build/sbom.json (CycloneDX). Fails on a licence that nobody has judged, on a known
vulnerability, and where advisories can't be read. `--advisories`: a clone of github.com/pypa/advisory-database, for
machines that reach no advisory service. `--write-lock`: pin anew what is installed here; needs uv.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

HERE = Path(__file__).parent
LOCK = HERE / "lock.txt"
EXTRAS = ("dev", "docs", "describe", "dicom", "gguf", "quickstart", "serve")  # `label`: gradio holds Pillow below 13
PERMISSIVE = re.compile(
    r"\b(MIT|BSD|Apache|ISC|PSF|Python Software Foundation|Zlib|CC0|0BSD|Unlicense|CNRI|HPND|BSL|docopt)\b|0BSD|MIT-0",
    re.IGNORECASE,
)
COPYLEFT = re.compile(r"GPL|GNU|MPL|Mozilla|EUPL|SSPL|Business Source|Commons Clause", re.IGNORECASE)
JUDGED = {
    "certifi": "MPL-2.0 covers its own files, which are used unchanged",
    "hypothesis": "MPL-2.0 covers its own files; development only",
    "pathspec": "MPL-2.0 covers its own files; development only",
    "tqdm": "MPL-2.0 covers its own files, which are used unchanged",
    "soxr": "LGPL-2.1: a shared library that whoever gets an image can replace",
    "num2words": "LGPL; development only",
}
OFFLINE = "give --advisories a clone of github.com/pypa/advisory-database"
NVIDIA = re.compile(r"(nvidia|cuda)-(?!ml-py)")  # what torch for CUDA is linked with
BUNDLED = {  # shared libraries inside wheels, by the beginnings of their names
    "libx264": "GPL-2.0-or-later, or bought from x264 LLC",
    "libx265": "GPL-2.0-or-later, or bought from MulticoreWare",
    "libsndfile": "LGPL-2.1-or-later",
    "libmp3lame": "LGPL-2.0-or-later",
}


def pins(text: str) -> dict[str, str]:
    """{normalized name: version} of a lock; of several versions for different Pythons the newest."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, flags=re.MULTILINE)
    result: dict[str, str] = {}
    for name, version in found:
        name = canonicalize_name(name)
        result[name] = max(version, result.get(name, version), key=Version)
    return result


def licence(package: Distribution) -> str:
    """As its metadata says; '' if it says nothing."""
    about = package.metadata
    classified = [line.rpartition(" :: ")[2] for line in about.get_all("Classifier", []) if line.startswith("License")]
    lines = (about.get("License") or "").strip().splitlines()
    return about.get("License-Expression") or ", ".join(classified) or (lines[0] if lines else "")


def judgement(name: str, text: str) -> str | None:
    """Why a licence is fine; None where nobody has judged it."""
    if name in JUDGED:
        return JUDGED[name]
    return "permissive" if PERMISSIVE.search(text) and not COPYLEFT.search(text) else None


def licences(locked: dict[str, str]) -> list[tuple[str, str, str | None]]:
    """(name, licence, judgement) of each locked package."""
    rows: list[tuple[str, str, str | None]] = []
    for name in sorted(locked):
        try:
            text = licence(distribution(name))
        except PackageNotFoundError:
            fine = "NVIDIA's own terms; only with torch for CUDA" if NVIDIA.match(name) else "not installed here"
            rows.append((name, "", fine))
            continue
        rows.append((name, text, judgement(name, text)))
    return rows


def bundled() -> list[tuple[str, str, str]]:
    """(package, shared library, its licence) of installed wheels that carry one of BUNDLED."""
    found = set()
    for package in distributions():
        for file in package.files or []:
            for beginning, terms in BUNDLED.items():
                if file.name.startswith(beginning):
                    found.add((canonicalize_name(package.metadata["Name"]), beginning, terms))
    return sorted(found)


def write_licences(rows: list[tuple[str, str, str | None]], path: Path) -> None:
    text = "# Licences\n\nOf the packages in lock.txt, as their metadata says; written by `make audit`.\n\n"
    text += "| package | licence | judgement |\n|---|---|---|\n"
    text += "".join(f"| {name} | {terms} | {fine or '**not judged**'} |\n" for name, terms, fine in rows)
    text += "\nShared libraries that wheels carry, which matter to whoever hands on an image with them:\n\n"
    text += "| package | library | licence |\n|---|---|---|\n"
    text += "".join(f"| {name} | {library} | {terms} |\n" for name, library, terms in bundled())
    path.write_text(text, encoding="utf-8")


def affected(advisory: dict, name: str, version: str) -> bool:
    """Whether an advisory in the OSV schema is about this version of a PyPI package."""
    if advisory.get("withdrawn"):
        return False
    for entry in advisory.get("affected", []):
        if canonicalize_name(entry["package"]["name"]) != name:
            continue
        if version in map(str, entry.get("versions", [])):
            return True
        if any(within(one["events"], Version(version)) for one in entry.get("ranges", []) if one["type"] != "GIT"):
            return True
    return False


def within(events: list[dict[str, object]], version: Version) -> bool:
    inside = False
    for event in events:
        (kind, text), *_ = event.items()
        bound = Version(str(text))
        if kind == "introduced" and version >= bound:
            inside = True
        elif (kind == "fixed" and version >= bound) or (kind == "last_affected" and version > bound):
            inside = False
    return inside


def advisories_in(folder: Path, locked: dict[str, str]) -> Iterator[str]:
    """'name version: id (aliases)' of each advisory in a clone of the advisory database, or what is wrong with that."""
    files = sorted((folder / "vulns").glob("*/*.yaml"))
    if not files:
        yield f"{folder}: no vulns/*/*.yaml here; {OFFLINE}"
        return
    newest = max(time.gmtime(path.stat().st_mtime) for path in files)
    print(f"advisories of {folder}, the newest of {newest.tm_year}-{newest.tm_mon:02}-{newest.tm_mday:02}")
    for name, version in sorted(locked.items()):
        for path in sorted((folder / "vulns" / name).glob("*.yaml")):
            advisory = yaml.safe_load(path.read_text(encoding="utf-8"))
            if affected(advisory, name, version):
                yield f"{name} {version}: {advisory['id']} ({', '.join(advisory.get('aliases', []))})"


def advisories_online(locked: dict[str, str]) -> Iterator[str]:
    """As `advisories_in`, by pip-audit, and what it couldn't look up, which it ends with exit status 0 for."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(LOCK), "--disable-pip", "--require-hashes"]
    done = subprocess.run([*command, "--format", "json", "--progress-spinner", "off"], capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except ValueError:
        yield f"pip-audit: {(done.stderr.strip().splitlines() or ['no answer'])[-1]}; {OFFLINE}"
        return
    for one in found:
        yield from (f"{one['name']} {one['version']}: {bug['id']}" for bug in one.get("vulns", []))
    if skipped := [one["name"] for one in found if "skip_reason" in one]:
        yield f"{len(skipped)} packages weren't looked up, {skipped[0]} first: no advisory service here; {OFFLINE}"


def write_lock() -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as installed:
        for package in distributions():
            if canonicalize_name(package.metadata["Name"]) != "finetune-kit":
                installed.write(f"{package.metadata['Name']}=={Version(package.version).public}\n")
        installed.flush()
        command = ["uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--python-version", "3.11"]
        command += [part for extra in EXTRAS for part in ("--extra", extra)]
        command += [
            "--constraints",
            installed.name,
            "--no-annotate",
            "--custom-compile-command",
            "python audit/audit.py --write-lock",
        ]
        subprocess.run([*command, str(HERE.parent / "pyproject.toml"), "--output-file", str(LOCK)], check=True)


def unlocked(project: dict, locked: dict[str, str]) -> list[str]:
    """The direct dependencies that the lock leaves out, or holds at a version that pyproject.toml doesn't allow."""
    extras = [line for name in EXTRAS for line in project["optional-dependencies"][name]]
    wanted = [Requirement(line) for line in [*project["dependencies"], *extras]]
    return [
        f"{one}: {locked.get(canonicalize_name(one.name), 'nothing')} in the lock"
        for one in wanted
        if one.name != project["name"]
        and not one.specifier.contains(locked.get(canonicalize_name(one.name), "0"), prereleases=True)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--advisories", type=Path)
    parser.add_argument("--write-lock", action="store_true")
    options = parser.parse_args()
    if options.write_lock:
        write_lock()
    locked = pins(LOCK.read_text(encoding="utf-8"))
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = licences(locked)
    write_licences(rows, HERE / "licences.md")
    sbom = HERE.parent / "build" / "sbom.json"
    sbom.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "cyclonedx_py", "requirements", str(LOCK)]
    about = ["--pyproject", str(HERE.parent / "pyproject.toml"), "--output-file", str(sbom)]
    subprocess.run([*command, *about], check=True)
    wrong = [*unlocked(project, locked), *(f"{name}: {terms}: not judged" for name, terms, fine in rows if not fine)]
    wrong += advisories_in(options.advisories, locked) if options.advisories else advisories_online(locked)
    print(f"{len(locked)} packages; licences: {HERE / 'licences.md'}; SBOM: {sbom}")
    print("\n".join(wrong) or "nothing is known against any of them")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
