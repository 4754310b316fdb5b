"""What `finetune merge` proved, read and checked: the certificate of a merged folder, and the hashes in it.

certificate.json stands in the run and, the same, in merged/. Its keys:

    format                      1
    merged_into, why, how       the candidate that was kept, why, and whether it was merged in a stream
    reference                   what the candidates are compared with: what was trained
    dtypes                      {"llm": of the trained LLM's weights, "computed": , "merged": }
    rows, positions, media      held-out rows, next tokens compared, {kind: media} shown
    candidates                  {name: measures}; `saved`, `trained`, `base`: the same of what stands on disk, of the
                                reference, and of the LLM without the adapter
    bounds                      beyond which the merge would have been refused
    versions                    of the packages
    language_model              its name, revision, and {file: sha256} of its weights where they lie in a folder
    sha256, adapter_sha256      {file: hash} of merged/ without this file, and of the adapter's folder

Measures: `kl` (nats a token, from the reference), `agreement` (share of equal likeliest tokens),
`largest_logit_difference` (of log-probabilities), `kl_from_base`, `scores` {task: {metric: value}}, or `not_scored`,
the reason.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.common.errors import ArtifactError
from finetune.common.run_folder import RunFolder, read_json

NAME = "certificate.json"
FORMAT = 1
BESIDE = ("manifest.json", "recipe.yaml", "samples")  # what publishing adds to a model
COLUMNS = {  # {measure: (what a table calls it, how it is written)}
    "kl": ("KL (nats)", ".2g"),
    "agreement": ("same token", ".1%"),
    "largest_logit_difference": ("largest difference", ".2g"),
    "kl_from_base": ("KL from base", ".2g"),
}


def read_certificate(path: Path | str) -> dict[str, Any]:
    """`path`: the file, or a run's or merged model's folder. Raises ArtifactError where it is missing or damaged."""
    path = Path(path)
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        raise ArtifactError(f"{file} is missing: `finetune merge` writes it")
    content = read_json(file)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ArtifactError(f"{file} isn't a certificate of format {FORMAT} (found: {found}): merge again")
    for key, kind in (("sha256", dict), ("adapter_sha256", dict), ("candidates", dict), ("merged_into", str)):
        if not isinstance(content.get(key), kind) or not content[key]:
            raise ArtifactError(f"{file} is damaged: it has no {key}; merge again")
    return content


def verify(certificate: Mapping[str, Any], folder: Path | str, key: str = "sha256") -> None:
    """That `folder`, merged/ or a copy of it, holds what the certificate is of, and nothing else; with `key`
    'adapter_sha256' the adapter's folder. Files of `hashed_files` count. Raises ArtifactError with the first file
    that differs.
    """
    folder = Path(folder)
    known, found = certificate[key], {path.relative_to(folder).as_posix(): path for path in hashed_files(folder)}
    belongs = "the certificate belongs to other weights, or the folder is damaged: copy it anew, or merge again"
    for name in sorted(known.keys() - found.keys()):
        raise ArtifactError(f"{folder / name} is missing, but certified: {belongs}")
    for name in sorted(found.keys() - known.keys()):
        raise ArtifactError(f"{folder / name} isn't among the certified files: {belongs}")
    for name, path in found.items():
        if (got := file_hash(path)) != known[name]:
            raise ArtifactError(f"{path}: sha256 {got[:12]}..., certified is {known[name][:12]}...: {belongs}")


def read_verified(run: RunFolder) -> dict[str, Any]:
    """The certificate of a run's merged model, which is of that model and of the adapter that is there, if one is.
    Raises ArtifactError: where the adapter was trained again since, merged/ is of the one before.
    """
    content = read_certificate(run.certificate)
    verify(content, run.merged)
    if run.adapter.is_dir():
        verify(content, run.adapter, "adapter_sha256")
    return content


def hashed_files(folder: Path) -> list[Path]:
    """All files below `folder` that make up a model: no certificate, card, hidden file, or what publishing adds."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != NAME
        and path.suffix != ".md"
        and path.relative_to(folder).parts[0] not in BESIDE
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def file_hashes(folder: Path) -> dict[str, str]:
    """{file: sha256} of `hashed_files`, named from the folder on."""
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in hashed_files(folder)}


def weights_hashes(name: str) -> dict[str, str]:
    """{file: sha256} of the weights of an LLM that is a folder or a .gguf file; {} of one that a commit names."""
    path = Path(name)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {file.name: file_hash(file) for file in files}


def file_hash(path: Path) -> str:
    """sha256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def table(certificate: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a model: what was trained, the candidates, the LLM without the adapter.

    {"candidate": name, "kept": whether it is what merged/ holds, "kl", "agreement", "largest_logit_difference",
    "kl_from_base", "scores": {"TASK.METRIC": value} of each task's main metric}; None where it isn't known.
    """
    measured = {
        certificate.get("reference", "what was trained"): certificate.get("trained") or {},
        **{f"merged into {name}": found for name, found in certificate["candidates"].items()},
        "the LLM without the adapter": certificate.get("base") or {},
    }
    primary = certificate.get("primary") or {}
    return [
        {
            "candidate": name,
            "kept": name == f"merged into {certificate['merged_into']}",
            **{column: found.get(column) for column in COLUMNS},
            "scores": {
                f"{task}.{metric}": (found.get("scores") or {}).get(task, {}).get(metric)
                for task, metric in primary.items()
            },
        }
        for name, found in measured.items()
    ]


def cells(certificate: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """`table` as text: (names of the columns, cells of each row). Scores that no row has are left out."""
    rows = table(certificate)
    metrics = [metric for metric in rows[0]["scores"] if any(row["scores"][metric] is not None for row in rows)]

    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return ["", *(name for name, _ in COLUMNS.values()), *metrics], [
        [
            row["candidate"] + (" (kept)" if row["kept"] else ""),
            *(text(row[column], form) for column, (_, form) in COLUMNS.items()),
            *(text(row["scores"][metric], ".3f") for metric in metrics),
        ]
        for row in rows
    ]


def markdown(certificate: Mapping[str, Any]) -> str:
    """A paragraph and a table, for a card."""
    names, rows = cells(certificate)
    lines = [
        f"Merged into {certificate['merged_into']}: {certificate.get('why', '')}. Compared with "
        f"{certificate.get('reference', 'what was trained')} on {certificate.get('rows', 0):,} held-out rows, "
        f"{certificate.get('positions', 0):,} next tokens.",
        "",
        "| " + " | ".join(names) + " |",
        "|---" + "|---:" * (len(names) - 1) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"
