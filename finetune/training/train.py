"""Train: recipe -> rows -> tokens -> features -> packed rows -> the stages, on one loaded LLM -> adapter folder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from accelerate import PartialState

from finetune.common.certificate import weights_hashes
from finetune.common.energy import EnergyMeter
from finetune.common.errors import TrainingError
from finetune.common.progress import console, fresh_memory, peak_memory_bytes, quiet_libraries
from finetune.common.run_folder import RunFolder, read_json, whole_folder, write_json
from finetune.data.media import Limits
from finetune.data.rows import Source
from finetune.data.sources import adapter_options, cache_folder, limits_of, model_arguments, sources_of
from finetune.evaluation import plots
from finetune.evaluation.scores import answers_to, look_of, merit, scored
from finetune.model import adapter
from finetune.model.assistant import Assistant
from finetune.model.build import Parts, build_model
from finetune.model.composite import MultimodalModel
from finetune.model.language_model import default_device, packs_exactly
from finetune.recipe.load import dump_recipe
from finetune.recipe.schema import Recipe
from finetune.training.collate import Collator
from finetune.training.pack import plan_rows
from finetune.training.prepare import Ready, make_ready
from finetune.training.run_stage import run_stage
from finetune.training.samples import Shared, stage_rows
from finetune.training.trainer import refuse_several_gpus
from finetune.training.validation import Validation

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")


def train(
    recipe: Recipe,
    run: Path | str | None = None,
    resume: bool = False,
    *,
    shared: Shared | None = None,
    told: Callable[[float], bool] | None = None,
) -> RunFolder:
    """Train a recipe's stages and write the adapter folder. Ctrl-C leaves a whole checkpoint; `resume` goes on.

    `shared`: parts that are loaded already; `told(merit)` hears of every look at the validation rows, and may end the
    stage by True.
    """
    quiet_libraries()
    fresh_memory()
    refuse_several_gpus()
    # Encoding may keep the others waiting for hours.
    processes = PartialState(cpu=default_device().type == "cpu", timeout=timedelta(days=1))
    folder = RunFolder(Path(run or Path("runs") / recipe.name))
    if processes.is_main_process:
        folder = RunFolder.create(folder.path, dump_recipe(recipe), resume)
        tell_versions(folder.path / "versions.json", processes.num_processes)
    processes.wait_for_everyone()
    begin = perf_counter()
    with EnergyMeter() as meter:
        result = train_plain(
            folder,
            sources=sources_of(recipe),
            model=model_arguments(recipe),
            adapter_options=adapter_options(recipe),
            stages=[stage.model_dump() for stage in recipe.train.stages],
            seed=recipe.seed,
            cache_folder=cache_folder(recipe),
            limits=limits_of(recipe),
            answers={"max_new_tokens": recipe.evaluate.max_new_tokens, "batch": recipe.evaluate.batch},
            shared=shared,
            told=told,
            **recipe.train.model_dump(exclude={"stages", "cache", "cache_folder"}),
        )
    if not processes.is_main_process:
        return folder
    seconds = result.pop("seconds")
    folder.update_metrics(
        train=result,
        seconds={**seconds, "train": perf_counter() - begin},
        energy_joules={f"train_{device}": joules for device, joules in meter.joules.items()},
        peak_memory_bytes={f"train_{device}": value for device, value in peak_memory_bytes().items()},
    )
    plots.losses({name: stage["losses"] for name, stage in result["stages"].items()}, folder.plots / "loss.png")
    console.print(f"adapter: {folder.adapter}")
    return folder


def train_plain(
    folder: RunFolder,
    *,
    sources: Sequence[Source],
    model: Mapping[str, Any],
    adapter_options: Mapping[str, Any] | None,
    stages: Sequence[Mapping[str, Any]],
    seed: int,
    cache_folder: Path | None,
    limits: Limits,
    answers: Mapping[str, Any],
    shared: Shared | None,
    told: Callable[[float], bool] | None,
    tokens_per_batch: int,
    accumulate: int,
    encode_batch: int,
    workers: int,
    checkpoint_every_n_layers: int,
    save_every_n_steps: int,
    mixing_temperature: float,
    validation: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The same from plain values. Returns losses and tokens per stage, and seconds per part."""
    first = PartialState().is_main_process
    ready = make_ready(
        folder,
        sources=sources,
        model=model,
        seed=seed,
        cache_folder=cache_folder,
        limits=limits,
        shared=shared,
        validation_limit=validation["limit"] if validation else 0,
        epochs=sum(stage["epochs"] for stage in stages),
        encode_batch=encode_batch,
        workers=workers,
        tokens_per_batch=tokens_per_batch,
    )
    parts, features, samples = ready.parts, ready.features, ready.samples
    if cache_folder:
        for _, encoder in parts.encoders.values():
            encoder.module.to("cpu")  # not needed while the LLM trains
    composite = build_model(
        parts,
        llm=model["llm"],
        adapter_options=adapter_options,
        seed=seed,
        with_encoders=not cache_folder,
        asks=ready.asks,
        language_model=shared.language_model if shared else None,
    )
    if shared:
        shared.composite = composite
    composite.encode_batch = encode_batch
    if checkpoint_every_n_layers:
        composite.causal_lm.activation_checkpointing_enable(every_n_layers=checkpoint_every_n_layers)
    packed = packs_exactly(composite.causal_lm)
    if not packed:
        console.print("in this LLM packed samples would see each other: they stand in padded rows instead")
    weighed = bool(composite.heads) or any(source.loss_weight != 1 for source in sources)
    head_outputs = {name: len(samples["target"][samples["head"].index(name)]) for name in composite.heads}
    begin = perf_counter()
    results: dict[str, Any] = {}
    for number, stage in enumerate(stages):
        seen = stage_rows(
            folder, ready.training, samples, stage, composite, parts, features, tokens_per_batch, mixing_temperature
        )
        collator = Collator(
            seen.samples,
            features.features if cache_folder else lambda kind, key: features.prepared(kind, key).values,
            field="features" if cache_folder else "media",
            packed=packed,
            pad_token_id=parts.tokenizer.pad_token_id,
            heads=head_outputs if weighed and not stage["distill"] else None,
        )
        rows = plan_rows(
            seen.longest,
            seen.weights,
            capacity=tokens_per_batch,
            epochs=stage["epochs"],
            seed=seed + 1000 * number,
            groups=seen.groups,
        )
        results[stage["name"]] = run_stage(
            folder,
            composite,
            parts,
            collator,
            rows,
            seen.lengths,
            stage,
            watcher(composite, ready, sources, folder.checkpoints / stage["name"], answers, validation, told),
            accumulate=accumulate,
            save_every_n_steps=save_every_n_steps,
            workers=workers,
            seed=seed,
        )
    trained_seconds = perf_counter() - begin
    if first:
        base = base_names(model, composite, parts)
        with whole_folder(folder.adapter) as writing:
            adapter.save_adapter_folder(composite, parts.tokenizer, writing, base=base, seed=seed, media=asdict(limits))
    PartialState().wait_for_everyone()
    # Cached, media are decoded and encoded before the LLM trains; otherwise in between.
    seconds = {**features.seconds, "encode": features.seconds["encode"] + composite.encode_seconds}
    seconds["llm"] = trained_seconds - (0.0 if cache_folder else seconds["decode"] + seconds["encode"])
    return {
        "stages": results,
        "rows": len(ready.training),
        "tokens_per_epoch": sum(len(ids) for ids in samples["input_ids"]),
        "packed": packed,
        "seconds": seconds,
    }


def watcher(
    model: MultimodalModel,
    ready: Ready,
    sources: Sequence[Source],
    folder: Path,
    answers: Mapping[str, Any],
    validation: Mapping[str, Any] | None,
    told: Callable[[float], bool] | None,
) -> Validation | None:
    """What looks at the validation rows while a stage trains; None where nothing does."""
    if validation is None:
        return None
    features, parts = ready.features, ready.parts
    assistant = Assistant(model, parts.tokenizer, parts.placeholders, features.encoders, features.limits)

    def look() -> dict[str, dict[str, float]]:
        said = answers_to(assistant, ready.looked_at, sources, look=look_of(features), **answers)
        return scored(ready.asks, ready.looked_at, sources, said)

    return Validation(
        model,
        folder,
        look=look,
        merit=partial(merit, asks=ready.asks, metric=validation["metric"]),
        every_n_steps=validation["every_n_steps"],
        patience=validation["patience"],
        told=told,
    )


def tell_versions(path: Path, processes: int) -> None:
    """Keep what a run began with; say which versions have changed where it is resumed.

    Raises TrainingError for another number of processes: each would go on in the middle of another's rows.
    """
    now = {name: version(name) for name in PACKAGES} | {"processes": processes}
    before = read_json(path) if path.is_file() else now
    if before["processes"] != processes:
        raise TrainingError(
            f"{path.parent}: this run began with {before['processes']} processes and can't go on with {processes}"
        )
    for name in PACKAGES:
        if before.get(name) != now[name]:
            console.print(f"this run began with {name} {before.get(name)}, and goes on with {now[name]}")
    write_json(path, before)


def base_names(model: Mapping[str, Any], composite: MultimodalModel, parts: Parts) -> dict[str, Any]:
    """What the adapter folder must name to be rebuilt: the LLM and the encoders, by the commits that were loaded."""
    llm = {**model["llm"], "revision": commit_of(composite.causal_lm, model["llm"]["revision"])}
    keys = ("name", "revision", "quantize", "double_quantize", "dtype")
    return {
        "language_model": {key: llm[key] for key in keys},
        "language_model_sha256": weights_hashes(llm["name"]),
        "tune_encoders": dict(model["tune_encoders"]),
        "encoders": {
            name: {
                "kind": kind,
                "options": options.model_dump()
                | {"revision": commit_of(parts.encoders[name][1].module, options.revision)},
            }
            for name, (kind, options) in model["encoders"].items()
        },
    }


def commit_of(module: Any, asked: str | None) -> str | None:
    """The commit that transformers resolved a Hub name to; None for a folder."""
    return getattr(module.config, "_commit_hash", None) or asked
