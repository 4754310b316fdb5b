"""`finetune export`: write a merged model for another engine, and compare the engine's answers with the model's."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from finetune.common import certificate
from finetune.common.disk import writing
from finetune.common.errors import ArtifactError, ExportRefused, option
from finetune.common.progress import bar, console, fresh_memory, quiet_libraries
from finetune.common.run_folder import RunFolder, RunLike, refuse_several_processes, whole_folder, write_json
from finetune.common.version import versions
from finetune.data.sample import KINDS
from finetune.export._contract import (
    FIRST_TOKENS,
    EngineAnswers,
    EngineMissing,
    ExportResult,
    MergedModel,
    Probe,
    TargetOptions,
    Verification,
)
from finetune.export._target import read_target

FORMAT = 1
PROBES = 16  # questions compared, at most
MAX_NEW_TOKENS = 24  # per compared answer
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "gguf")


def export_run(
    source: RunLike, to: str, out: Path | str | None = None, options: Sequence[str] = (), *, verify: bool = True
) -> ExportResult:
    """Export the merged model of a run, or a merged folder, to the target `to`.

    It is written to `out`; by default to RUN/exports/TARGET, or next to the merged folder. `options`: KEY=VALUE pairs
    of the target. With `verify`, the target answers questions in a separate process and its tokens are compared.

    Raises RecipeError for an unknown target or option, ArtifactError for a source that can't be exported or an existing
    folder, and ExportRefused, leaving no folder, if the target can't run the model or answers differently.
    TrainingError if the disk gets full.
    """
    quiet_libraries()
    refuse_several_processes("`finetune export`")
    target, target_options, folder = read_target(Path(source), to, out, options)
    model = merged_model(Path(source))
    with tempfile.TemporaryDirectory() as media_folder, bar(f"export {to}", 3) as step:
        probes = make_probes(model, Path(source), Path(media_folder), target.COMPARED_MEDIA) if verify else []
        step()
        with writing(folder, "the exported model", "export again"), whole_folder(folder) as partial:
            exported = target.write(model, partial, target_options)
            fresh_memory()
            step()
            verification: Verification | None = None
            not_verified: str | None = f"left out by {option('--no-verify', 'verify=False')}"
            if verify:
                try:
                    answers = target.answer(partial, probes, target_options, MAX_NEW_TOKENS)
                    verification, not_verified = compare(probes, answers), None
                    refuse_unless_equal(verification, target_options.min_equal, to)
                except EngineMissing as error:
                    not_verified = str(error)
            content = {
                "to": to,
                "class": exported.model_class,
                "why": exported.reason,
                "notes": exported.notes,
                "verified": verification and asdict(verification),
                "not_verified": not_verified,
                "format": FORMAT,
                "details": exported.details or {},
                "options": publishable(target_options),
                "versions": versions(PACKAGES),
                "sha256": certificate.file_hashes(partial),
            }
            write_json(partial / "export.json", content)
            step()
    notes = tuple(note.replace("FOLDER", str(folder)) for note in exported.notes)
    for note in notes:
        console.print(note)
    return ExportResult(to, exported.model_class, exported.reason, notes, folder, verification, not_verified)


def merged_model(path: Path) -> MergedModel:
    """The merged model of a run or a merged folder, checked against its certificate. Raises ArtifactError."""
    from finetune.model.load import read_composition

    if (path / "recipe.yaml").is_file():
        run = RunFolder.open(path, needs="merged")
        certificate.read_verified(run)
        return MergedModel(run.merged, run.adapter if run.adapter.is_dir() else None)
    if (path / "multimodal.json").is_file():
        raise ArtifactError(f"{path}: an adapter folder; only merged models are exported: name its run")
    read_composition(path)
    certificate.verify_if_certified(path)
    return MergedModel(path)


def make_probes(model: MergedModel, source: Path, media_folder: Path, kinds: Sequence[str]) -> list[Probe]:
    """Held-out questions of the run, or questions about noise, with the merged model's answers. `kinds`: of media that
    the target is asked about.

    Raises ArtifactError if no question fits into the LLM's context.
    """
    from finetune.export._check.probes import answered, held_out_questions, noise_questions
    from finetune.model.assistant import without_kinds
    from finetune.model.load import load_merged

    assistant = load_merged(model.folder)
    predictions = source / "predictions.jsonl"
    noise = noise_questions([kind for kind in assistant.encoders if kind in kinds], media_folder)
    questions = held_out_questions(predictions, PROBES) if predictions.is_file() else []
    left_out = [kind for kind in KINDS if kind not in kinds]
    asked = [tuple(without_kinds(messages, left_out)) for messages in questions]
    if asked != questions:
        asked += noise
    probes = answered(assistant, list(dict.fromkeys(asked)), media_folder, MAX_NEW_TOKENS)
    probes = probes or answered(assistant, noise, media_folder, MAX_NEW_TOKENS)
    if not probes:
        raise ArtifactError(
            f"{model.folder}: no question fits into its LLM's context; export with "
            f"{option('--no-verify', 'verify=False')}"
        )
    del assistant
    fresh_memory()
    return probes


def compare(probes: Sequence[Probe], engine: EngineAnswers) -> Verification:
    pairs = [(probe.answer, answer) for probe, answer in zip(probes, engine.answers, strict=True)]
    equal_first_tokens = sum(ours[:FIRST_TOKENS] == theirs[:FIRST_TOKENS] for ours, theirs in pairs)
    equal, different = sum(ours == theirs for ours, theirs in pairs), len({ours for ours, _ in pairs})
    return Verification(engine.engine, len(pairs), equal_first_tokens, equal, different)


def refuse_unless_equal(verification: Verification, min_equal: float, to: str) -> None:
    if verification.equal_first_tokens < min_equal * verification.rows:
        raise ExportRefused(
            f"{verification.engine} begins {verification.equal_first_tokens} of {verification.rows} answers like the "
            f"merged model; min_equal is {min_equal:g}. Nothing was kept: the option `min_equal` lowers the "
            f"bound, {option('--no-verify', 'verify=False')} keeps the {to} export without comparing it"
        )


def publishable(options: TargetOptions) -> dict[str, object]:
    """The options without paths of this machine."""
    paths = {
        name
        for name, field in type(options).model_fields.items()
        if isinstance(field.json_schema_extra, dict) and "path" in field.json_schema_extra
    }
    return options.model_dump(mode="json", exclude=paths)
