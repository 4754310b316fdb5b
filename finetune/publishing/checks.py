"""What must be right before anything is uploaded. Every check gives lines: what is wrong, and what to do."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from finetune.common.errors import option
from finetune.evaluation.report.words import memory
from finetune.publishing.parts import Base, is_local

TEXT = (".json", ".txt", ".md", ".jinja", ".yaml")
SUFFIXES = (".safetensors", ".finetune", *TEXT, ".png", ".webp", ".model")


def licence_problems(bases: Sequence[Base], data: Mapping[str, str | None], recipe: Path) -> list[str]:
    lines = [
        f"licence of {base.key}: {base.public_name} doesn't name one that can be read; write "
        f"`licenses: {{{base.key}: ...}}` under `publish` in {recipe}"
        for base in bases
        if not base.licence
    ]
    if unknown := [name for name, licence in data.items() if not licence]:
        lines.append(
            f"licence of the data: none is known for {', '.join(dict.fromkeys(unknown))}; add a NOTICE beside the rows "
            f"(Licence: ...), or write `licenses: {{data: ...}}` under `publish` in {recipe}"
        )
    return lines


def base_problems(bases: Sequence[Base], merged: bool, recipe: Path) -> list[str]:
    """An adapter's LLM and encoders must be where others can load them from; a merged model holds them."""
    return [
        f"{base.key}: {base.public_name} is a local folder, so nobody else could load the adapter; if the same weights "
        f"are on the Hub, write `hub_names: {{{base.key}: user/name}}` under `publish` in {recipe}; otherwise push "
        f"with {option('--merged', 'merged=True')}"
        for base in bases
        if base.name is None and not merged
    ]


def unknown_parts(bases: Sequence[Base], keys: Iterable[str], recipe: Path) -> list[str]:
    known = {"data", *(base.key for base in bases)}
    return [
        f"{recipe}: publish names {key!r}, but this model has {', '.join(sorted(known))}"
        for key in sorted(set(keys) - known)
    ]


def file_problems(folder: Path, private: Sequence[str]) -> list[str]:
    """Files of other types, and text files that hold one of the paths in `private`."""
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix not in SUFFIXES:
            lines.append(f"{name}: files of this type aren't published; only {', '.join(SUFFIXES)} are")
        elif path.suffix in TEXT:
            text = path.read_text(encoding="utf-8", errors="replace")
            lines += [
                f"{name}:{text.count(chr(10), 0, text.index(local)) + 1}: holds {local!r}, a path of this machine; "
                "take it out"
                for local in private
                if local in text
            ]
    return lines


def private_paths(run: Path, recipe_paths: Iterable[str]) -> list[str]:
    """The home folder, the run folder and the recipe's local paths; none so short that it could be anything."""
    paths = {str(Path.home()), str(run.resolve()), *(path for path in recipe_paths if is_local(path))}
    return sorted(path for path in paths if len(Path(path).parts) > 2)


def sizes(folder: Path) -> list[str]:
    """The number of files and their size, then a line for each, the largest first."""
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    lines = [f"  {_size(size):>9}  {name}" for name, size in sorted(files.items(), key=lambda pair: -pair[1])]
    return [f"{len(files)} files, {_size(sum(files.values()))}:", *lines]


def _size(count: int) -> str:
    return memory(count) if count >= 2**20 else f"{count / 2**10:.1f} KiB"
