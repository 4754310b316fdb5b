"""Train: recipe -> rows -> tokens -> features -> packed rows -> the stages, on one loaded LLM -> adapter folder."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from accelerate import PartialState
from datasets import Dataset

from finetune import adapter, plots
from finetune.assemble import Features, Parts, build_model, load_parts
from finetune.assistant import Assistant
from finetune.certificate import weights_hashes
from finetune.data.asks import Ask, asks_of, names_of
from finetune.data.collate import Collator
from finetune.data.pack import plan_rows
from finetune.data.rows import Entry, Source, read_splits, some, summary
from finetune.energy import EnergyMeter
from finetune.errors import Interrupted, TrainingError
from finetune.language_model import default_device, packs_exactly
from finetune.media import Limits
from finetune.model import MultimodalModel
from finetune.prepare import Shared, fill_cache, stage_rows, tokenized
from finetune.progress import TrainingBar, console, fresh_memory, peak_memory_bytes, quiet_libraries
from finetune.recipe import Recipe, dump_recipe
from finetune.run_folder import RunFolder, read_json, whole_folder, write_json, write_text
from finetune.scores import answers_to, by_name, look_of, merit, scored
from finetune.sources import adapter_options, cache_folder, limits_of, model_arguments, sources_of
from finetune.trainer import refuse_several_gpus, train_stage
from finetune.validation import Validation

FEW_STEPS = 50
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
    plots.losses(result["stages"], folder.plots / "loss.png")
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


@dataclass(frozen=True)
class Ready:
    """What is there before the LLM is loaded. `samples`: the training rows as tokens; `looked_at`: validation rows."""

    training: list[Entry]
    looked_at: list[Entry]
    asks: dict[str, Ask]
    parts: Parts
    features: Features
    samples: Dataset


def make_ready(
    folder: RunFolder,
    *,
    sources: Sequence[Source],
    model: Mapping[str, Any],
    seed: int,
    cache_folder: Path | None,
    limits: Limits,
    shared: Shared | None,
    validation_limit: int | None,
    epochs: int,
    encode_batch: int,
    workers: int,
    tokens_per_batch: int,
) -> Ready:
    """Rows read, their media encoded, their conversations tokenized."""
    first = PartialState().is_main_process
    entries = read_splits(sources, seed)
    training = entries["train"]
    looked_at = validation_rows(entries["validation"], sources, validation_limit, seed)
    asks = asks_of(sources, training)
    parts = shared.parts if shared else load_parts(**model, seed=seed)
    for _, encoder in parts.encoders.values():
        encoder.module.to(parts.device)  # an earlier training may have put it away
    features = shared.features if shared else Features(parts.encoders, cache_folder, limits)
    for entry in [*training, *looked_at]:
        for medium in entry.sample.media:
            features.key(medium, entry.sample.where)
    if first:
        write_json(folder.data / "summary.json", summary(entries))
        if cache_folder:
            media = [medium for entry in [*training, *looked_at] for medium in entry.sample.media]
            fill_cache(media, features, epochs, encode_batch, workers)
    PartialState().wait_for_everyone()
    features.refresh()
    heads = [(name, asks[name]) if asks[name].trained else None for name in names_of(training, sources)]
    samples = tokenized([entry.sample for entry in training], parts, features, tokens_per_batch, heads)
    samples = samples.add_column("loss_weight", [sources[entry.source].loss_weight for entry in training])
    pairs = zip(training, samples["group"], strict=True)
    groups = [f"{entry.source}/{group}" if group else "" for entry, group in pairs]  # two files may both have a user 1
    samples = samples.remove_columns("group").add_column("group", groups)
    if first:
        refuse_other_rows(folder, samples)
    lengths = [len(ids) for ids in samples["input_ids"]]
    console.print(
        f"{len(lengths):,} rows, {sum(lengths):,} tokens an epoch in rows of {tokens_per_batch:,} tokens "
        f"(one sample: {min(lengths)} to {max(lengths)})"
    )
    return Ready(training, looked_at, asks, parts, features, samples)


def validation_rows(entries: Sequence[Entry], sources: Sequence[Source], limit: int | None, seed: int) -> list[Entry]:
    """At most `limit` rows of each task."""
    named = by_name(entries, sources) if limit != 0 else {}
    return [entry for numbers in named.values() for entry in some([entries[i] for i in numbers], limit, seed)]


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


def run_stage(
    folder: RunFolder,
    model: MultimodalModel,
    parts: Parts,
    collator: Collator,
    rows: Sequence[Sequence[int]],
    lengths: Sequence[int],
    stage: Mapping[str, Any],
    validation: Validation | None,
    *,
    accumulate: int,
    save_every_n_steps: int,
    workers: int,
    seed: int,
) -> dict[str, Any]:
    """One stage, or what is left of it, ending on its best weights where it is validated. Returns its losses (one a
    step), steps, tokens and seconds.
    """
    trained = adapter.set_trainable(model, stage["trains"])
    processes = PartialState()
    steps = -(-len(rows) // (accumulate * processes.num_processes))
    if processes.is_main_process:
        folder.remove_torn(stage["name"])
    processes.wait_for_everyone()
    checkpoint = folder.newest_checkpoint(stage["name"])
    if checkpoint is not None and checkpoint.name == "final":
        adapter.load_trained(model, checkpoint)
        console.print(f"{stage['name']}: done before")
        return read_json(checkpoint / "result.json")
    console.print(f"{stage['name']}: trains " + ", ".join(f"{role} ({count:,})" for role, count in trained.items()))
    if steps < FEW_STEPS:
        console.print(
            f"{stage['name']}: only {steps} optimizer step{'s' * (steps > 1)}, hardly enough to learn from: lower "
            f"train.tokens_per_batch or raise the stage's epochs (now {stage['epochs']})"
        )
    if validation and checkpoint is not None:
        validation.resume(int(checkpoint.name.rpartition("-")[2]))
    begin = perf_counter()
    try:
        # Stopped after the look that had ended it: nothing is left to train.
        log = (
            log_of(checkpoint)
            if validation and validation.exhausted
            else train_stage(
                model,
                parts.tokenizer,
                rows=rows,
                collator=collator,
                parts=adapter.trained_parts(model, stage["trains"]),
                folder=folder.checkpoints / stage["name"],
                resume_from=checkpoint,
                accumulate=accumulate,
                save_every_n_steps=save_every_n_steps,
                workers=workers,
                seed=seed,
                dtype=parts.dtype,
                callbacks=[TrainingBar(stage["name"], steps), *([validation] if validation else [])],
                distill_temperature=stage["distill"]["temperature"] if stage["distill"] else None,
                # The first of the warmup's steps has a rate of zero: too much where the whole stage is a few steps.
                warmup=stage["warmup"] if stage["warmup"] * steps >= 1 else 0.0,
                **{
                    key: value
                    for key, value in stage.items()
                    if key not in {"name", "trains", "epochs", "sources", "distill", "warmup"}
                },
            )
        )
    except Interrupted as error:
        raise Interrupted(
            f"{stage['name']}: {error}; go on with --resume --run {folder.path}, and the same --set"
        ) from None
    best_step = validation.restore_best() if validation else None
    done = validation.history[-1]["step"] if validation else steps  # fewer where it ended early
    trained_rows = rows[: done * accumulate * processes.num_processes]
    result = {
        "losses": [round(entry["loss"], 6) for entry in log],
        "token_accuracy": [round(entry["mean_token_accuracy"], 4) for entry in log],
        "steps": done,
        "samples": sum(len(row) for row in trained_rows),
        "tokens": sum(lengths[number] for row in trained_rows for number in row),
        "seconds": perf_counter() - begin,
        "trained_weights": trained,
        "validation": validation.history if validation else [],
        "best_step": best_step,
    }
    final = folder.checkpoints / stage["name"] / "final"
    if processes.is_main_process:
        with whole_folder(final) as partial:
            adapter.save_trained(model, partial)
            write_json(partial / "result.json", result)
        for old in [*final.parent.glob("checkpoint-*"), *final.parent.glob("best")]:
            shutil.rmtree(old)
    processes.wait_for_everyone()
    return result


def log_of(checkpoint: Path | None) -> list[dict[str, float]]:
    """The log that a checkpoint keeps, an entry a step."""
    found = read_json(checkpoint / "trainer_state.json")["log_history"] if checkpoint else []
    return [entry for entry in found if "loss" in entry]


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


def refuse_other_rows(folder: RunFolder, samples: Dataset) -> None:
    """Keep a digest of the training rows; raises TrainingError where a resumed run has others."""
    told = [samples[name][:] for name in samples.column_names]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    path = folder.data / "rows.sha256"
    if path.is_file() and path.read_text(encoding="utf-8").strip() != digest:
        raise TrainingError(
            f"{folder.path}: the training rows or their media have changed since this run began; begin anew with --run"
        )
    write_text(path, digest + "\n")


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
