"""Train: recipe -> rows -> tokens -> features -> packed rows -> the stages, on one loaded LLM -> adapter folder."""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from accelerate import PartialState

from finetune.common.certificate import weights_hashes
from finetune.common.disk import writing
from finetune.common.energy import EnergyMeter
from finetune.common.errors import RecipeError
from finetune.common.memory import TRAINING, enough_memory
from finetune.common.progress import console, fresh_memory, peak_memory_bytes, quiet_libraries
from finetune.common.run_folder import RunFolder, RunLike, read_json, whole_folder, write_json
from finetune.data.rows import picked
from finetune.evaluation import plots
from finetune.evaluation.report.tables import planned_beside
from finetune.evaluation.results import Metrics, StageResult, TrainingResult
from finetune.evaluation.scores import Scores, answer_batches, answers_to, measures_by_task, selection_score
from finetune.model.adapter import save_adapter_folder
from finetune.model.composite import MultimodalModel
from finetune.model.computing_dtype import measured_dtype
from finetune.model.features import features_key
from finetune.model.language_model import default_device
from finetune.model.manifest import AdapterManifest
from finetune.model.module_names import module_shapes
from finetune.model.row_layout import RowKind, layout
from finetune.model.run import Run
from finetune.recipe.load import Recipe, RecipeLike, as_recipe, dump_recipe, load_recipe, refuse_missing_packages
from finetune.recipe.schema import Stage, Train
from finetune.training.base_trial import base_row_kind
from finetune.training.began import model_files, record_versions, refuse_other_models
from finetune.training.cache_choice import choose_cache
from finetune.training.collate import Collator
from finetune.training.liger import use_liger
from finetune.training.missing_sampler import refuse_missing_sampler, refuse_unplain_base
from finetune.training.plan.apart import WAIT_SECONDS, as_begun, planning, without_auto
from finetune.training.prepare import PreparedRun, prepare, stage_rows
from finetune.training.rollouts import Reward, Rollouts, Sampler, policy_sampler, row_kind_of_answers, task_reward
from finetune.training.run_stage import run_stage
from finetune.training.shared import Shared, language_model_for
from finetune.training.stage_training import StageTraining
from finetune.training.steps import samples_of
from finetune.training.tracked_answers import TrackedAnswer, TrackedRows
from finetune.training.trainer import refuse_several_gpus
from finetune.training.validation import OnValidation, ValidationCallback
from finetune.training.vllm_sampler import VllmSampler


def train(
    recipe: RecipeLike,
    run: RunLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    *,
    overrides: Sequence[str] = (),
    on_validation: OnValidation | None = None,
    reward: Reward | None = None,
) -> RunFolder:
    """Train a recipe's stages and write the adapter folder into `run`, by default runs/NAME. `overwrite` removes a run
    that is there.

    Ctrl-C, SIGTERM and SIGHUP leave a whole checkpoint and raise Interrupted; `resume` goes on from it. `overrides`:
    'full.dotted.key=value'. `on_validation(score)` runs after each validation pass; return True to stop the stage.
    `reward(sample, answer)`: the reward of a sampled answer, a number, in stages with the objective grpo; by default
    the measure that the objective names.
    Raises RecipeError, DataError, ModelError, TrainingError.
    """
    recipe = as_recipe(recipe, overrides)
    return train_in(
        Path(run or Path("runs") / recipe.name), recipe, resume, overwrite, on_validation=on_validation, reward=reward
    )


@enough_memory("training", TRAINING)
def train_in(
    path: Path,
    recipe: Recipe,
    resume: bool = False,
    overwrite: bool = False,
    *,
    shared: Shared | None = None,
    on_validation: OnValidation | None = None,
    reward: Reward | None = None,
) -> RunFolder:
    """As `train`. `shared`: components that are loaded already."""
    if reward is not None and not any(stage.objective.samples_answers for stage in recipe.train.stages):
        raise RecipeError("reward: no stage of the recipe samples answers: give one `objective: grpo`")
    quiet_libraries()
    fresh_memory()
    refuse_several_gpus()
    refuse_missing_packages(recipe)
    refuse_missing_sampler(recipe)
    refuse_unplain_base(recipe)
    on_gpu = default_device().type == "cuda"
    # Encoding may keep the others waiting for hours.
    processes = PartialState(cpu=default_device().type == "cpu", timeout=timedelta(days=1))
    with RunFolder(path).locked() if processes.is_main_process else nullcontext():
        folder = RunFolder(path)
        if processes.is_main_process:
            folder.refuse_taken(resume, overwrite)  # before a plan, which takes long
            recipe = as_begun(recipe, folder) if resume else with_measured_dtype(recipe)
            recipe = without_auto(recipe, on_gpu, processes.num_processes)
            if recipe.train.cache == "auto":
                choice = choose_cache(recipe)
                recipe = choice.of(recipe)
                console.print(choice.reason)
            folder = RunFolder.create(folder.path, dump_recipe(recipe), resume, overwrite)
            record_versions(folder.path / "versions.json", processes.num_processes)
            refuse_other_models(folder, dict(model_files(recipe)))
        processes.wait_for_everyone()
        if not processes.is_main_process:
            recipe = load_recipe(folder.recipe)  # with the numbers that the main process chose
        begin = perf_counter()
        planned = on_gpu and processes.num_processes == 1 and shared is None
        with planning(folder.recipe) if planned else nullcontext(lambda seconds: None) as finish:
            with EnergyMeter() as meter:
                prepared = prepare(folder, recipe, shared)
                preparing = {**prepared.run.features.seconds, "train": perf_counter() - begin}
                before = seconds_before(folder, preparing) if processes.is_main_process else {}
                result, seconds = train_stages(prepared, shared, on_validation, reward)
            seconds["train"] = perf_counter() - begin + sum(one.seconds_before for one in result.stages.values())
            figures = finish(WAIT_SECONDS) or {}
        if not processes.is_main_process:
            return folder
        folder.update_metrics(
            **{name: values for name, values in figures.items() if name.startswith("planned_")},
            train=result.model_dump() | {"resumed": resume},
            seconds={part: value + before.get(part, 0.0) for part, value in seconds.items()},
            energy_joules={f"train_{device}": joules for device, joules in meter.joules.items()},
            peak_memory_bytes={f"train_{device}": value for device, value in peak_memory_bytes().items()},
        )
        plots.losses({name: stage.losses for name, stage in result.stages.items()}, folder.plots / "loss.png")
        for part, amounts in planned_beside(Metrics.model_validate(folder.read_metrics())):
            console.print(f"{part}: {amounts}")
        console.print(f"adapter: {folder.adapter}")
        return folder


def seconds_before(folder: RunFolder, preparing: Mapping[str, float]) -> Mapping[str, float]:
    """What preparing took in earlier parts of a run, to which that of this part, `preparing`, is added on disk."""
    path = folder.data / "seconds.json"
    before: Mapping[str, float] = read_json(path) if path.is_file() else {}
    write_json(path, {part: value + before.get(part, 0.0) for part, value in preparing.items()})
    return before


def with_measured_dtype(recipe: Recipe) -> Recipe:
    """The recipe with the dtype that a new run computes in on this machine, or with `auto` where that is the device's
    usual one. Raises ModelError.
    """
    return recipe.with_dtype(measured_dtype(recipe.model.language_model, default_device()))


def train_stages(
    prepared: PreparedRun,
    shared: Shared | None = None,
    on_validation: OnValidation | None = None,
    reward: Reward | None = None,
) -> tuple[TrainingResult, dict[str, float]]:
    """Load the LLM, train the stages in order, and write the adapter folder. Returns results and seconds by part."""
    run = prepared.run
    settings, features, components = run.recipe.train, run.features, run.components
    model = load_composite(run, shared)
    if (commit := commit_of(model.causal_lm, None)) and PartialState().is_main_process:
        refuse_other_models(run.folder, {f"the commit of {run.recipe.model.language_model.name}": commit})
    kind = layout_of(model, run)
    begin = perf_counter()
    results: dict[str, StageResult] = {}
    for number, stage in enumerate(settings.stages):
        samples, rows = stage_rows(prepared, stage, model, kind, run.recipe.seed + 1000 * number)
        collator = Collator(
            samples,
            features.features if settings.cache else lambda medium: features.prepared(medium).values,
            field="features" if settings.cache else "media",
            kind=row_kind_of_answers(kind, model.composition.fusion) if stage.objective.samples_answers else kind,
            pad_token_id=components.tokenizer.pad_token_id,
            heads=prepared.samples.head_outputs if run.weighted and stage.objective.heads else None,
            distributions=prepared.teacher_data[stage.name].outputs if stage.name in prepared.teacher_data else None,
            prompts_both_ways=components.placement.prompts_both_ways,
        )
        training = StageTraining(
            model=model,
            tokenizer=components.tokenizer,
            stage=stage,
            settings=settings,
            collator=collator,
            rows=rows,
            folder=run.folder.checkpoints / stage.name,
            seed=run.recipe.seed,
            dtype=components.dtype,
            origin=origin_of(run, model) if stage.objective.reference else "",
            rollouts=rollouts_of(prepared, stage, collator, model, reward) if stage.objective.samples_answers else None,
        )
        results[stage.name] = run_stage(
            run.folder, training, validation_callback(prepared, stage, model, on_validation)
        )
    seconds_training = perf_counter() - begin
    if PartialState().is_main_process:
        with writing(run.folder.path, "the adapter"), whole_folder(run.folder.adapter) as partial:
            save_adapter_folder(model, components.tokenizer, partial, manifest_of(run, model))
    PartialState().wait_for_everyone()
    # Cached, media are decoded and encoded before the LLM trains; otherwise in between.
    seconds = {**features.seconds, "encode": features.seconds["encode"] + model.encode_seconds}
    seconds_training += sum(stage.seconds_before for stage in results.values())
    seconds["llm"] = seconds_training - (0.0 if settings.cache else seconds["decode"] + seconds["encode"])
    tokens = sum(prepared.samples.lengths)
    result = TrainingResult(stages=results, rows=len(prepared.training), tokens_per_epoch=tokens, row_kind=kind)
    return result, seconds


def rollouts_of(
    prepared: PreparedRun, stage: Stage, collator: Collator, model: MultimodalModel, reward: Reward | None
) -> Rollouts:
    """The rollouts of a stage that samples answers. `reward`: see `train`."""
    run = prepared.run
    options: Any = stage.objective.options
    tokenizer: Any = run.components.tokenizer
    assistant = run.assistant(model)
    sampler: Sampler = policy_sampler(assistant, run.features)
    if stage.objective.sampled_by_vllm:
        longest = max(collator.samples.lengths) + options.max_new_tokens
        folder = run.folder.data / f"vllm-{stage.name}"
        sampler = VllmSampler(assistant, run.features, longest, folder)
    return Rollouts(
        stage,
        picked(prepared.training, samples_of(stage, prepared.training)),
        collator,
        sampler=sampler,
        decode=lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)).strip(),
        reward=reward or task_reward(run.bindings, options.reward),
        seed=run.recipe.seed,
    )


def origin_of(run: Run, model: MultimodalModel) -> str:
    """What identifies the LLM, its adapter and the encoders of a run, as JSON."""
    recipe, llm = run.recipe, run.recipe.model.language_model
    content = [
        recipe.model.model_dump(mode="json"),
        recipe.adapter and recipe.adapter.model_dump(mode="json"),
        commit_of(model.causal_lm, llm.revision),
        weights_hashes(llm.name),
        {kind: features_key(kind, encoder, recipe.media) for kind, encoder in run.components.encoders.items()},
        recipe.media.model_dump(mode="json"),
        str(run.components.dtype),
    ]
    return json.dumps(content)


LAID_OUT = {
    RowKind.PADDED: "each sample has a padded row of its own",
    RowKind.PACKED: "rows are packed under a mask, and share no prefixes",
    RowKind.SEGMENTS: "rows are packed, and share no prefixes",
}


def layout_of(model: MultimodalModel, run: Run) -> RowKind:
    """How this LLM's rows are laid out; what it can't take is printed."""
    recipe = run.recipe
    attention, share = recipe.model.language_model.attention, recipe.train.share_prefixes
    if recipe.model.base is not None:
        shown = [tuple(source.task.media) for source in recipe.data]
        kind, line = base_row_kind(model, run.components, shown, share, attention == "auto")
        console.print(line)
        return kind
    kind, why = layout(model.causal_lm, share, by_segments=attention == "auto")
    if attention != "auto":
        key = f"{recipe.model.language_key}.attention"
        console.print(f"rows are {kind}, without shared prefixes: {key} is {attention}, not auto")
    if why:
        name = f"{type(model.causal_lm).__name__} ({model.causal_lm.config.model_type})"
        console.print(f"{name}: {LAID_OUT[kind]}: {why}")
    return kind


def load_composite(run: Run, shared: Shared | None = None) -> MultimodalModel:
    """The model to be trained; encoders whose features are cached are put away."""
    settings = run.recipe.train
    if settings.cache and run.components.base is None:
        for encoder in run.components.encoders.values():
            encoder.module.to("cpu")  # not needed while the LLM trains
    language_model = shared.language_model if shared else language_model_for(settings, run.components)
    model = run.build(with_encoders=not settings.cache, language_model=language_model)
    if shared:
        shared.composite = model
    set_up(model, settings)
    return model


def set_up(model: MultimodalModel, settings: Train) -> None:
    """What of a recipe's `train` is set in the model itself."""
    model.encode_batch = settings.encode_batch
    if settings.checkpoint_every_n_layers:
        model.causal_lm.activation_checkpointing_enable(every_n_layers=settings.checkpoint_every_n_layers)
    if settings.liger:
        use_liger(model.causal_lm)


def validation_callback(
    prepared: PreparedRun, stage: Stage, model: MultimodalModel, on_validation: OnValidation | None
) -> ValidationCallback | None:
    """None where the recipe asks for no validation."""
    run, settings = prepared.run, prepared.run.recipe.train.validation
    if settings is None:
        return None
    assistant, halving = run.assistant(model), answer_batches()
    tracked = TrackedRows(prepared.validation, run) if run.recipe.train.track else None

    def evaluate() -> tuple[Scores, list[float], list[TrackedAnswer]]:
        answers = answers_to(assistant, prepared.validation, run.recipe.evaluate, run.features, halving=halving)
        measures = measures_by_task(run.bindings, prepared.validation, answers)
        rows = [row for own in measures.values() for row in own]
        good = [] if any(row.get("group") for row in rows) else [float(row["good"]) for row in rows]
        scores = {name: run.bindings[name].task.score(own) for name, own in measures.items()}
        return scores, good, tracked.answered(answers) if tracked else []

    return ValidationCallback(
        model,
        run.folder.checkpoints / stage.name,
        settings,
        evaluate=evaluate,
        select=partial(selection_score, bindings=run.bindings, metric=settings.metric),
        on_validation=on_validation,
    )


def manifest_of(run: Run, model: MultimodalModel) -> AdapterManifest:
    """What the adapter folder needs to be rebuilt: LLM and encoders by the commits that were loaded."""
    recipe = run.recipe
    llm = recipe.model.language_model.model_copy(
        update={
            "revision": commit_of(model.causal_lm, recipe.model.language_model.revision),
            "attention": "auto",
            "chat_template": None,  # the tokenizer holds it
            **({} if recipe.model.base else {"trust_remote_code": False}),
        }
    )
    encoders = {}
    for name, part in recipe.model.encoders.items():
        requested: Any = part.options
        revision = commit_of(run.components.encoders[name].module, requested.revision)
        encoders[name] = type(part)(part.kind, requested.model_copy(update={"revision": revision}))
    return AdapterManifest(
        model=recipe.model.model_copy(
            update={recipe.model.language_key.removeprefix("model."): llm, "encoders": encoders}
        ),
        llm_sha256=weights_hashes(llm.name),
        tune_encoders=recipe.tune_encoders,
        placeholders=model.composition.placeholders,
        bindings=run.bindings,
        media=recipe.media,
        seed=recipe.seed,
        modules=module_shapes(model.causal_lm),
    )


def commit_of(module: Any, requested: str | None) -> str | None:
    """The commit that transformers resolved a Hub name to; None for a folder."""
    return getattr(module.config, "_commit_hash", None) or requested
