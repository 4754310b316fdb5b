"""What must be right before anything is uploaded. Every check gives lines: what is wrong, and what to do."""

import getpass
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from finetune.evaluation.report.words import memory
from finetune.publishing.parts import Base, is_local
from finetune.publishing.staging import VOCABULARY

SUFFIXES = (".safetensors", ".json", ".txt", ".md", ".png", ".webp", ".jinja", ".yaml", ".model")
SHOWN = 3  # places of a kind, in a file
SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36}|\bgithub_pat_[A-Za-z0-9_]{40,}",
    "a Google key": r"\bAIza[0-9A-Za-z_-]{35}",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "an npm token": r"\bnpm_[A-Za-z0-9]{36}",
    "a JSON web token": r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+",
    "a Slack token": r"\bxox[abeprs]-[0-9A-Za-z-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
ROOT = r"(?<![\w/.:*#)}-])"  # before a path from the root: no part of an address, a pattern or a longer path
PATHS = (
    ROOT + r"/(?:home|Users|root|mnt|media|tmp|var|opt|srv|workspaces?|work|scratch|data|content|private|Volumes|gpfs|"
    r"lustre|nfs|kaggle)/[\w.@+-]+",
    r"\bfile:/{1,3}[\w.@+%-]+",
    r"(?<![\w/.])~/\w[\w.@+-]*",  # not ~/.cache, which all have
    r"\b[A-Za-z]:[\\/]+(?:Users|Documents and Settings)[\\/]",
    r"(?<![\w\\])\\\\[\w.-]+\\[\w$.-]+\\\w",  # \\server\share\...
)


def licence_problems(bases: Sequence[Base], data: Mapping[str, str | None], recipe: str) -> list[str]:
    lines = [
        f"licence of {base.key}: {base.called} doesn't name one that is found; write publish.licenses "
        f"{{{base.key}: ...}} in {recipe}"
        for base in bases
        if not base.licence
    ]
    if unnamed := [name for name, licence in data.items() if not licence]:
        lines.append(
            f"licence of the data: none is named for {', '.join(dict.fromkeys(unnamed))}; a NOTICE.md beside the rows "
            f"may tell it; write publish.licenses {{data: ...}} in {recipe}"
        )
    return lines


def base_problems(bases: Sequence[Base], merged: bool, recipe: str) -> list[str]:
    """An adapter's parts must be where others can load them from; a merged model holds them."""
    return [
        f"{base.key}: {base.called} is a folder of this machine, so nobody else could load the adapter; if the "
        f"same weights are on the Hub, write publish.hub_names {{{base.key}: user/name}} in {recipe}; else push "
        "with --merged"
        for base in bases
        if base.name is None and not merged
    ]


def unknown_parts(bases: Sequence[Base], named: Iterable[str], recipe: str) -> list[str]:
    there = {"data", *(base.key for base in bases)}
    return [
        f"{recipe}: publish names {key!r}, but this model has {', '.join(sorted(there))}"
        for key in sorted(set(named) - there)
    ]


def file_problems(folder: Path, private: Sequence[str]) -> list[str]:
    """Files of other types, and personal paths, tokens and user names in files. `private`: paths of this machine that
    must be nowhere.
    """
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix not in SUFFIXES:
            lines.append(f"{name}: files of this type aren't published; only {', '.join(SUFFIXES)} are")
        elif path.suffix == ".safetensors":
            lines += _told(name, _metadata(path), private, paths=True)
        elif path.suffix in (".json", ".txt", ".md", ".jinja", ".yaml"):
            text = path.read_text(encoding="utf-8", errors="replace")
            if path.suffix == ".json":
                text = text.replace("\\\\", "\\").replace("\\/", "/")  # as it was before it was written as JSON
            lines += _told(name, text, private, paths=path.name not in VOCABULARY)
    return lines


def _metadata(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return "\n".join(f"{key}={value}" for key, value in (file.metadata() or {}).items())


def _told(name: str, text: str, private: Sequence[str], paths: bool) -> list[str]:
    """Lines for what mustn't be in a text. Secrets are never repeated. `paths`: also what only looks like a path."""
    lines = []
    for what, pattern in SECRETS.items():
        if found := re.search(pattern, text):
            lines.append(f"{name}:{_line(text, found.start())}: holds {what}; take it out, and revoke it")
    wanted = [re.escape(path) for path in private] + (list(PATHS) if paths else [])
    places: dict[str, int] = {}
    for pattern in wanted:
        for found in re.finditer(pattern, text):
            places.setdefault(found[0][:100], found.start())
    lines += [
        f"{name}:{_line(text, start)}: names a path of this machine, {path!r}; take it out"
        for path, start in list(places.items())[:SHOWN]
    ]
    user = _user()
    if user and (found := re.search(_named(re.escape(user), paths), text)):
        lines.append(f"{name}:{_line(text, found.start())}: names {user!r}, who is logged in here; take it out")
    return lines


def _named(user: str, paths: bool) -> str:
    """Where a word is a user's name: many are other words too, and may be the owner's on the Hub."""
    places = [rf"\b{user}@[\w-]"]
    if paths:
        places.append(rf"{ROOT}/(?:[\w.@+-]+/)+{user}(?![\w.@+-])")
        places.append(rf"\b(?i:by|user|user_?name|author|owner|login)[\"']?(?:\s*[:=]\s*|\s)[\"']?{user}(?![\w/-])")
    return "|".join(places)


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container may have no name for its user
        return None


def private_paths(run: Path, recipe_paths: Iterable[str]) -> list[str]:
    """Paths that tell of this machine: not so short that they would be found in anything."""
    paths = {str(Path.home()), str(run.resolve()), *(path for path in recipe_paths if is_local(path))}
    return sorted(path for path in paths if len(Path(path).parts) > 2)


def sizes(folder: Path) -> list[str]:
    """A line a file, the largest first, and the total."""
    found = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    lines = [f"  {_size(size):>9}  {name}" for name, size in sorted(found.items(), key=lambda pair: -pair[1])]
    return [f"{len(found)} files, {_size(sum(found.values()))}:", *lines]


def _size(count: int) -> str:
    return memory(count) if count >= 2**20 else f"{count / 2**10:.1f} KiB"
