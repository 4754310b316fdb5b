"""Export: a merged model as another engine loads it, and what that engine answers beside what ours does."""

import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from finetune.common import certificate
from finetune.common.errors import ArtifactError, ExportRefused
from finetune.common.progress import bar, console, fresh_memory, quiet_libraries
from finetune.common.registry import load_part, parse_options
from finetune.common.run_folder import RunFolder, read_json, refuse_several_processes, whole_folder, write_json
from finetune.export._contract import Answered, EngineMissing, Probe, Source

FORMAT = 1
PROBES = 16  # questions compared, at most
MAX_NEW_TOKENS = 24  # of an answer that is compared
FIRST = 4  # tokens: what counts against `min_equal`
PACKAGES = ("finetune", "torch", "transformers", "tokenizers", "safetensors", "peft", "gguf")


def export_run(
    source: Path | str, to: str, out: Path | str | None = None, options: Sequence[str] = (), *, verify: bool = True
) -> dict[str, Any]:
    """Write a run's merged model, or a merged folder, for the target `to`; default: RUN/exports/TARGET, or beside the
    folder. `options`: KEY=VALUE of the target. With `verify` it is loaded there in a process of its own.

    Returns {"to", "class", "why", "notes", "folder", "verified": {"engine", "rows", "equal_first_tokens", "equal"} or
    None, "not_verified": why not, or None}. Raises RecipeError for a target or an option that there isn't,
    ArtifactError for a source that can't be exported or a folder that is there already, and ExportRefused, with
    nothing left, where the target can't hold the model or answers otherwise.
    """
    quiet_libraries()
    refuse_several_processes("`finetune export`")
    target = load_part("export", to)
    chosen = parse_options(options, target.Options)
    folder = Path(out) if out is not None else place_of(Path(source), to)
    if folder.exists():
        raise ArtifactError(f"{folder} is there already: remove it, or name another place with --out")
    found = source_of(Path(source))
    with tempfile.TemporaryDirectory() as media, bar(f"export {to}", 3) as step:
        probes, tokenizer = probes_of(found, Path(source), Path(media), target) if verify else ([], None)
        step()
        with whole_folder(folder) as partial:
            written = target.write(found, partial, chosen)
            fresh_memory()
            step()
            verified, reason = None, None if verify else "left out by --no-verify"
            if verify:
                try:
                    answered = target.answer(partial, probes, chosen, MAX_NEW_TOKENS)
                    verified = compared(probes, answered, tokenizer)
                    refuse_unless_equal(verified, chosen.min_equal, to)
                except EngineMissing as error:
                    reason = str(error)
            result = {
                "to": to,
                "class": written.loads_as,
                "why": written.why,
                "notes": list(written.notes),
                "verified": verified,
                "not_verified": reason,
            }
            content = result | {
                "format": FORMAT,
                "details": written.details or {},
                "options": told(chosen),
                "versions": versions(),
                "sha256": certificate.file_hashes(partial),
            }
            write_json(partial / "export.json", content)
            step()
    result["notes"] = [note.replace("FOLDER", str(folder)) for note in written.notes]
    for note in result["notes"]:
        console.print(note, soft_wrap=True, markup=False, highlight=False)
    return result | {"folder": str(folder)}


def place_of(path: Path, to: str) -> Path:
    """Where an export goes by default."""
    if (path / "recipe.yaml").is_file():
        return path / "exports" / to
    return path.absolute().with_name(f"{path.absolute().name}-{to}")


def source_of(path: Path) -> Source:
    """What is exported, as its certificate says it was merged. Raises ArtifactError."""
    if (path / "recipe.yaml").is_file():
        run = RunFolder.open(path, needs="merged")
        certificate.read_verified(run)
        return Source(run.merged, run.adapter if run.adapter.is_dir() else None)
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such folder: name a run, or a merged folder")
    if (path / "multimodal.json").is_file():
        raise ArtifactError(f"{path}: an adapter folder; what is exported is merged first: name its run")
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if config.get("model_type") != "finetune_multimodal":
        raise ArtifactError(
            f"{path}: neither a run nor a folder that `finetune merge` wrote"
            + (f" (its config.json is of type {config.get('model_type')!r})" if config else " (no config.json here)")
        )
    certificate.verify_if_certified(path)
    return Source(path)


def probes_of(found: Source, source: Path, media: Path, target: ModuleType) -> tuple[list[Probe], Any]:
    """Held-out rows of a run, else noise, with what the merged model answers; and its tokenizer. Raises ArtifactError
    where nothing can be asked.
    """
    from finetune.data.sample import Medium, Message
    from finetune.export._check.probes import examples, held_out, own_answers
    from finetune.model.load import load_merged

    assistant = load_merged(found.merged)
    predictions = source / "predictions.jsonl"
    conversations = held_out(predictions, PROBES) if predictions.is_file() else []
    conversations = conversations or examples(list(assistant.encoders), media)
    if not getattr(target, "TAKES_MEDIA", True):
        conversations = [
            tuple(Message(m.role, tuple(part for part in m.content if not isinstance(part, Medium))) for m in messages)
            for messages in [*conversations, *examples((), media)]
        ]
    probes = own_answers(assistant, list(dict.fromkeys(conversations)), MAX_NEW_TOKENS)
    probes = probes or own_answers(assistant, examples(list(assistant.encoders), media), MAX_NEW_TOKENS)
    if not probes:
        raise ArtifactError(f"{found.merged}: no question is short enough for its LLM to be compared; --no-verify")
    tokenizer = assistant.tokenizer
    del assistant
    fresh_memory()
    return probes, tokenizer


def compared(probes: Sequence[Probe], answered: Answered, tokenizer: Any) -> dict[str, Any]:
    """How many answers begin with the same tokens as ours (or text, where the engine tells no more), and are equal."""
    begin = equal = 0
    for probe, got in zip(probes, answered.answers, strict=True):
        ours: Any = probe.token_ids
        first: Any = ours[:FIRST]
        if isinstance(got, str):
            first, ours = tokenizer.decode(first, skip_special_tokens=True).strip(), probe.text
            got = got.strip()
            begin += got.startswith(first) if first else not got
        else:
            begin += got[:FIRST] == first
        equal += got == ours
    return {"engine": answered.engine, "rows": len(probes), "equal_first_tokens": begin, "equal": equal}


def refuse_unless_equal(verified: dict[str, Any], min_equal: float, to: str) -> None:
    if verified["equal_first_tokens"] < min_equal * verified["rows"]:
        raise ExportRefused(
            f"{verified['engine']} begins {verified['equal_first_tokens']} of {verified['rows']} answers as the merged "
            f"model does; min_equal is {min_equal:g}. Nothing was kept; `--option min_equal=X` asks for less, and "
            f"`--no-verify` keeps what was written for {to} to look at"
        )


def told(options: BaseModel) -> dict[str, Any]:
    """Options as they may be published: without this machine's paths."""
    paths = {
        name
        for name, field in type(options).model_fields.items()
        if isinstance(field.json_schema_extra, dict) and "path" in field.json_schema_extra
    }
    return options.model_dump(mode="json", exclude=paths)


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
