"""The certificate of a merged model: what `finetune merge` measured, and the hashes of the files it is about.

certificate.json stands in the run folder and, byte for byte the same, in merged/. `Certificate` documents its keys.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from finetune.common import display
from finetune.common.errors import ArtifactError
from finetune.common.run_folder import RunFolder, damaged, file_hash, read_json, write_text

NAME = "certificate.json"
FORMAT: Literal[1] = 1
UNTRAINED = "the untrained model"  # the base where no stage trains the adapter
PUBLISHED_BESIDE = ("recipe.yaml", "samples")  # what publishing puts beside a model's own files


def without_adapter(noun: str) -> str:
    """What a merged model is compared with. `noun`: LLM or base model."""
    return f"the {noun} without the adapter"


# JSON has no infinity: null stands for it, where a model gives a probability that isn't a number.
Distance = Annotated[float, BeforeValidator(lambda value: math.inf if value is None else value)]
FileHashes = Annotated[dict[str, str], Field(description="File name, relative to the folder -> SHA-256, hexadecimal.")]
ModelScores = dict[str, dict[str, float | None]]


class CertificatePart(BaseModel):
    model_config = ConfigDict(frozen=True)


class Measures(CertificatePart):
    """How far one model is from what was trained, over the compared positions."""

    kl: Distance = Field(description="KL divergence of its next token from the reference's; mean, in nats a token.")
    agreement: Distance = Field(description="Share of positions with the same most likely token.")
    largest_logit_difference: Distance = Field(
        description="Largest difference of a log-probability, among tokens that the reference gives at least 1e-4."
    )
    kl_from_base: Distance = Field(description="KL divergence from the base, in nats a token.")
    scores: ModelScores | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="Task -> metric -> value on the scored rows; null where these rows have no such value.",
    )
    not_scored: str | None = Field(
        default=None, exclude_if=lambda value: value is None, description="Why it has no scores, where it should have."
    )


class Bounds(CertificatePart):
    """Beyond these the merge would have been refused."""

    min_agreement: float = Field(description="Least share of equal next tokens.")
    max_kl: float = Field(description="Largest KL divergence, in nats a token.")
    min_kl_from_base: float | None = Field(description="Least KL divergence from the base; null: any.")


class Dtypes(CertificatePart):
    """Types of numbers, as torch names them, or nf4 or int8."""

    llm: str = Field(description="Of the LLM's weights while it was trained.")
    computed: str = Field(description="Of activations.")
    merged: str = Field(description="Of the merged weights.")


class LanguageModelFiles(CertificatePart):
    """The LLM that the adapter was trained over."""

    name: str = Field(description="Hub id, or the last part of a path.")
    revision: str | None = Field(description="Commit on the Hub; null for a folder.")
    sha256: FileHashes = Field(description="Hashes of its weights, if they lie in a folder.")


class Certificate(CertificatePart):
    """What a merge measured; certificate.json."""

    format: Literal[1] = Field(description="Version of this file's format.")
    merged_into: str = Field(description="The candidate that was kept.")
    why: str = Field(description="Why it was kept.")
    how: str = Field(description="Whether it was merged module by module, or in memory as a whole.")
    reference: str = Field(description="What the candidates are compared with: what was trained.")
    language_model: LanguageModelFiles
    dtype: str = Field(description="Of the merged weights.")
    dtypes: Dtypes
    rows: int = Field(description="Held-out rows compared.")
    rows_held_out: int = Field(description="Held-out rows in all.")
    rows_scored: int = Field(description="Compared rows that were also answered and scored.")
    positions: int = Field(description="Next tokens compared.")
    media: dict[str, int] = Field(description="Medium -> number shown.")
    primary: dict[str, str] = Field(description="Task -> its main metric.")
    saved: Measures = Field(description="Of the merged model, read back from disk.")
    candidates: dict[str, Measures] = Field(min_length=1, description="What was merged into -> its measures.")
    trained: Measures = Field(description="Of the reference itself.")
    base: Measures = Field(description="Of the base: `base_is` says what it is.")
    base_is: str = Field(
        default=without_adapter("LLM"),
        description="The LLM or base without the adapter, the other parts as trained; or the untrained model.",
    )
    bounds: Bounds
    versions: dict[str, str] = Field(description="Package -> version.")
    sha256: FileHashes = Field(min_length=1, description="Hashes of the merged folder's files, without this one.")
    adapter_sha256: FileHashes = Field(min_length=1, description="Hashes of the adapter folder's files.")

    def __repr__(self) -> str:
        return (
            f"Certificate: merged into {self.merged_into}; {self.saved.agreement:.1%} of {self.positions:,} next "
            f"tokens as trained, KL {self.saved.kl:.2g} nats, on {self.rows} of {self.rows_held_out:,} held-out rows"
        )

    def _repr_html_(self) -> str:
        return display.line(repr(self)) + display.table(*comparison(self))

    def write(self, path: Path) -> None:
        write_text(path, self.model_dump_json(indent=2) + "\n")


def read_certificate(path: Path | str) -> Certificate:
    """`path`: the file, or a run's or merged model's folder. Raises ArtifactError if it is missing or damaged."""
    path = Path(path)
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        raise ArtifactError(f"{file} is missing: `finetune merge` writes it")
    content = read_json(file)
    if (version := content.get("format")) != FORMAT:
        raise ArtifactError(f"{file} isn't a certificate of format {FORMAT} (got: {version}): merge again")
    try:
        return Certificate.model_validate(content)
    except ValidationError as error:
        raise damaged(file, error, "merge again") from None


def verify(certificate: Certificate, folder: Path | str, key: Literal["sha256", "adapter_sha256"] = "sha256") -> None:
    """Check that `folder` (merged/ or a copy of it; with 'adapter_sha256' the adapter's folder) holds exactly the
    certified files; only `hashed_files` count. Raises ArtifactError with the first file that differs.
    """
    folder = Path(folder)
    certified = certificate.sha256 if key == "sha256" else certificate.adapter_sha256
    files = {path.relative_to(folder).as_posix(): path for path in hashed_files(folder)}
    advice = "the certificate belongs to other weights, or the folder is damaged: copy it again, or merge again"
    for name in sorted(certified.keys() - files.keys()):
        raise ArtifactError(f"{folder / name} is missing, but certified: {advice}")
    for name in sorted(files.keys() - certified.keys()):
        raise ArtifactError(f"{folder / name} isn't among the certified files: {advice}")
    for name, path in files.items():
        if (actual := file_hash(path)) != certified[name]:
            raise ArtifactError(f"{path}: sha256 {actual[:12]}..., certified is {certified[name][:12]}...: {advice}")


def verify_if_certified(folder: Path) -> None:
    """`verify` for a model's folder that may carry no certificate, as an adapter's doesn't. Raises ArtifactError."""
    if (folder / NAME).is_file():
        verify(read_certificate(folder), folder)


def read_verified(run: RunFolder) -> Certificate:
    """The certificate of a run's merged model, checked against merged/ and, if there is one, the adapter's folder.
    Raises ArtifactError: if the adapter was trained again since, merged/ is of the one before.
    """
    certificate = read_certificate(run.certificate)
    verify(certificate, run.merged)
    if run.adapter.is_dir():
        verify(certificate, run.adapter, "adapter_sha256")
    return certificate


def hashed_files(folder: Path) -> list[Path]:
    """All files below `folder` that make up a model: no certificate, card, hidden file, or what publishing adds."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != NAME
        and path.suffix != ".md"
        and path.relative_to(folder).parts[0] not in PUBLISHED_BESIDE
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def file_hashes(folder: Path) -> dict[str, str]:
    """File name, relative to the folder -> SHA-256, of `hashed_files`."""
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in hashed_files(folder)}


def weights_hashes(name: str) -> dict[str, str]:
    """File name -> SHA-256 of the weights of an LLM that is a folder or a .gguf file; {} of one on the Hub."""
    path = Path(name)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {file.name: file_hash(file) for file in files}


def comparison(certificate: Certificate) -> tuple[list[str], list[list[str]]]:
    """What was trained, each candidate, and the base, with the score of each task's main metric:
    (column names, cells of each row). Scores that no model has are left out.
    """
    models = {certificate.reference: certificate.trained}
    for name, measures in certificate.candidates.items():
        models[f"merged into {name}" + (" (kept)" if name == certificate.merged_into else "")] = measures
    models[certificate.base_is] = certificate.base
    columns: list[tuple[str, str, Sequence[float | None]]] = [
        ("KL (nats)", ".2g", [measures.kl for measures in models.values()]),
        ("same token", ".1%", [measures.agreement for measures in models.values()]),
        ("largest difference", ".2g", [measures.largest_logit_difference for measures in models.values()]),
        ("KL from base", ".2g", [measures.kl_from_base for measures in models.values()]),
    ]
    for task, metric in certificate.primary.items():
        values = [(measures.scores or {}).get(task, {}).get(metric) for measures in models.values()]
        if any(value is not None for value in values):
            columns.append((f"{task}.{metric}", ".3f", values))
    cells = [
        [name, *("" if values[row] is None else format(values[row], form) for _, form, values in columns)]
        for row, name in enumerate(models)
    ]
    return ["", *(name for name, _, _ in columns)], cells
