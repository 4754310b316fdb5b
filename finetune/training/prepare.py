"""All that is ready before the LLM is loaded, and the rows that each stage uses."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
from accelerate import PartialState

from finetune.common.errors import RUN, TrainingError, option
from finetune.common.progress import Stopwatch, console, trim_memory
from finetune.common.run_folder import RunFolder, write_json, write_text
from finetune.data.rows import (
    by_task,
    picked,
    refuse_empty_splits,
    refuse_unfit,
    sampling_weights,
    subset,
    summary,
)
from finetune.data.run_rows import keep_rows, splits_of_run
from finetune.data.sample import Sample
from finetune.data.sample_table import SampleTable
from finetune.model.bindings import bindings_of
from finetune.model.composite import MultimodalModel
from finetune.model.plain_text import spelled
from finetune.model.row_layout import RowKind
from finetune.model.run import Run
from finetune.model.trained_for import refuse_unfit_teachers
from finetune.recipe.load import Recipe
from finetune.recipe.schema import Stage
from finetune.training.kept_samples import RowsDigest, tokenized_samples
from finetune.training.pack import Row
from finetune.training.prefixes import rows_of
from finetune.training.rollouts import rollout_rows, row_kind_of_answers
from finetune.training.samples import TokenizedSamples, compared, distilled, prompts
from finetune.training.shared import Shared
from finetune.training.steps import samples_of
from finetune.training.teachers import TeacherData, run_teachers
from finetune.training.unreadable import fill_and_leave_out


@dataclass(frozen=True)
class PreparedRun:
    """`training` and `validation` samples; `samples`: the training samples as tokens; `by_stage`: the samples of
    stages that compare answers (all of these), sample them (the prompts) or have another model as teacher, by name;
    `teacher_data`: outputs of these teachers, by stage; `watch`: the resources that all this took.
    """

    run: Run
    training: Sequence[Sample]
    validation: list[Sample]
    samples: TokenizedSamples
    by_stage: dict[str, TokenizedSamples]
    teacher_data: dict[str, TeacherData]
    watch: Stopwatch


def prepare(folder: RunFolder, recipe: Recipe, shared: Shared | None = None) -> PreparedRun:
    """Rows read, their media encoded, their conversations tokenized. `shared`: components that are loaded already."""
    first = PartialState().is_main_process
    if recipe.train.skip_bad_rows and PartialState().num_processes > 1:  # gradients are summed before they are tried
        raise TrainingError("train.skip_bad_rows: only for one process; leave it out, or launch one")
    watch = Stopwatch()
    refuse_unfit_teachers(recipe)
    with watch("read"):
        splits = splits_of_run(folder, recipe)
    refuse_empty_splits(splits, recipe)
    refuse_unfit(splits, recipe)
    limit = recipe.train.validation.limit if recipe.train.validation else 0
    validation = [
        sample
        for numbers in by_task(splits.validation).values()
        for sample in subset(picked(splits.validation, numbers), limit, recipe.seed)
    ]
    with watch("read"):
        bindings = bindings_of(recipe.data, splits.train)
    with watch("teacher"):
        teacher_data = run_teachers(recipe, splits.train, folder)
    with watch("components"):
        run = shared.run(folder, recipe, bindings) if shared else Run.load(folder, recipe, bindings)
    if first:
        name_control_tokens(splits.train, run.components.tokenizer)
    if run.components.base is None:
        for encoder in run.components.encoders.values():
            encoder.module.to(run.components.device)  # an earlier training may have put it away
    if first:
        with watch("read"):
            keep_rows(folder, splits, recipe)
        if run.features.stores:
            with watch("encode"):
                splits = replace(splits, train=fill_and_leave_out(splits.train, validation, run))
        with watch("read"):
            write_json(folder.data / "summary.json", {split: asdict(one) for split, one in summary(splits).items()})
    PartialState().wait_for_everyone()
    run.features.refresh()
    with watch("tokenize"):
        samples, digest = tokenized_samples(splits.train, run)
        samples_of_stages, digest = samples_by_stage(splits.train, run, digest)
        if first:
            refuse_other_rows(folder, digest)
        taught_samples = {name: data.tokenized(run) for name, data in teacher_data.items()}
    lengths = samples.lengths
    trim_memory()
    console.print(
        f"{len(lengths):,} rows, {sum(lengths):,} tokens an epoch in rows of {int(recipe.train.tokens_per_batch):,} "
        f"tokens (one sample: {min(lengths)} to {max(lengths)})"
    )
    return PreparedRun(run, splits.train, validation, samples, samples_of_stages | taught_samples, teacher_data, watch)


def samples_by_stage(training: Sequence[Sample], run: Run, digest: str) -> tuple[dict[str, TokenizedSamples], str]:
    """The answers that each stage compares, or the prompts that it samples answers to, by stage; and the digest of them
    and of what `digest` is of. Raises DataError.
    """
    result: dict[str, TokenizedSamples] = {}
    for stage in run.recipe.train.stages:
        objective = stage.objective
        if objective.compares or objective.samples_answers:
            rows = RowsDigest(digest)
            own = picked(training, samples_of(stage, training))
            found = prompts(own, objective, run) if objective.samples_answers else compared(own, objective.needs, run)
            result[stage.name] = TokenizedSamples.of(rows.read(found))
            digest = str(rows)
    return result, digest


def name_control_tokens(training: SampleTable, tokenizer: Any) -> None:
    """Print how many answers spell control tokens of the LLM, and the first of them."""
    answers = enumerate(training.each("answer"))
    found = ((number, tokens) for number, answer in answers if (tokens := spelled(answer or "", tokenizer)))
    if first := next(found, None):
        number, tokens = first
        console.print(
            f"{training[number].where}: the answer spells {', '.join(tokens)}, of which the LLM's chat is built; "
            f"{1 + sum(1 for _ in found):,} answers do: they are learned as text, not as such tokens"
        )


def refuse_other_rows(folder: RunFolder, digest: str) -> None:
    """Keep the digest of the training rows. Raises TrainingError where a resumed run has others."""
    path = folder.data / "rows.sha256"
    if path.is_file() and path.read_text(encoding="utf-8").strip() != digest:
        raise TrainingError(
            f"{folder.path}: the training rows or their media have changed since this run began; begin anew with "
            f"{option(*RUN)}"
        )
    write_text(path, digest + "\n")


def stage_rows(
    prepared: PreparedRun, stage: Stage, model: MultimodalModel, kind: RowKind, seed: int
) -> tuple[TokenizedSamples, Sequence[Row]]:
    """The samples that a stage uses, and the rows of all its epochs, in the order in which they train."""
    run, training = prepared.run, prepared.training
    chosen = samples_of(stage, training)
    own = picked(training, chosen)
    weights = sampling_weights(own, run.recipe.train.mixing_temperature)
    if stage.objective.needs == "texts":
        samples = TokenizedSamples.of(distilled(own, stage, run, model))
    elif stage.name in prepared.by_stage:
        samples = prepared.by_stage[stage.name]
    else:
        samples = prepared.samples.select(chosen)
    if stage.objective.samples_answers:
        kind = row_kind_of_answers(kind, model.composition.fusion)
        return samples, rollout_rows(run.recipe.train, stage, samples.lengths, weights, seed, kind)
    rows = rows_of(samples, weights, stage, model, kind, int(run.recipe.train.tokens_per_batch), seed)[0]
    pa.default_memory_pool().release_unused()
    trim_memory()
    return samples, rows
