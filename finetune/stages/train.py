"""Train: recipe -> rows -> tokens -> features -> packed rows -> the stages, on one loaded LLM -> adapter folder."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from accelerate import PartialState
from datasets import Dataset

from finetune import adapter, plots
from finetune.assemble import Features, Parts, build_model, load_parts
from finetune.data.collate import Collator
from finetune.data.pack import plan_rows
from finetune.data.rows import Source, read_splits, summary
from finetune.errors import Interrupted, TrainingError
from finetune.language_model import default_device, packs_exactly
from finetune.media import Limits
from finetune.model import MultimodalModel
from finetune.prepare import fill_cache, stage_rows, tokenized
from finetune.progress import TrainingBar, console, fresh_memory, peak_memory_bytes, quiet_libraries
from finetune.recipe import Recipe, dump_recipe
from finetune.run_folder import RunFolder, read_json, whole_folder, write_json, write_text
from finetune.sources import adapter_options, cache_folder, limits_of, model_arguments, sources_of
from finetune.trainer import refuse_several_gpus, train_stage

FEW_STEPS = 50
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")


def train(recipe: Recipe, run: Path | str | None = None, resume: bool = False) -> RunFolder:
    """Train a recipe's stages and write the adapter folder. Ctrl-C leaves a whole checkpoint; `resume` goes on."""
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
    result = train_plain(
        folder,
        sources=sources_of(recipe),
        model=model_arguments(recipe),
        adapter_options=adapter_options(recipe),
        stages=[stage.model_dump() for stage in recipe.train.stages],
        seed=recipe.seed,
        cache_folder=cache_folder(recipe),
        limits=limits_of(recipe),
        **recipe.train.model_dump(exclude={"stages", "cache", "cache_folder"}),
    )
    if not processes.is_main_process:
        return folder
    seconds = result.pop("seconds")
    folder.update_metrics(
        train=result,
        seconds={**seconds, "train": perf_counter() - begin},
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
    tokens_per_batch: int,
    accumulate: int,
    encode_batch: int,
    workers: int,
    checkpoint_every_n_layers: int,
    save_every_n_steps: int,
) -> dict[str, Any]:
    """The same from plain values. Returns losses and tokens per stage, and seconds per part."""
    first = PartialState().is_main_process
    entries = read_splits(sources, seed)
    parts = load_parts(**model, seed=seed)
    features = Features(parts.encoders, cache_folder, limits)
    training = entries["train"]
    for entry in training:
        for medium in entry.sample.media:
            features.key(medium, entry.sample.where)
    if first:
        write_json(folder.data / "summary.json", summary(entries))
        if cache_folder:
            epochs = sum(stage["epochs"] for stage in stages)
            media = [medium for entry in training for medium in entry.sample.media]
            fill_cache(media, features, epochs, encode_batch, workers)
    PartialState().wait_for_everyone()
    features.refresh()
    samples = tokenized([entry.sample for entry in training], parts, features, tokens_per_batch)
    if first:
        refuse_other_rows(folder, samples)
    lengths = [len(ids) for ids in samples["input_ids"]]
    console.print(
        f"{len(lengths):,} rows, {sum(lengths):,} tokens an epoch in rows of {tokens_per_batch:,} tokens "
        f"(one sample: {min(lengths)} to {max(lengths)})"
    )
    if cache_folder:
        for _, encoder in parts.encoders.values():
            encoder.module.to("cpu")  # not needed while the LLM trains
    composite = build_model(
        parts, llm=model["llm"], adapter_options=adapter_options, seed=seed, with_encoders=not cache_folder
    )
    composite.encode_batch = encode_batch
    if checkpoint_every_n_layers:
        composite.causal_lm.activation_checkpointing_enable(every_n_layers=checkpoint_every_n_layers)
    packed = packs_exactly(composite.causal_lm)
    if not packed:
        console.print("in this LLM packed samples would see each other: they stand in padded rows instead")
    begin = perf_counter()
    results: dict[str, Any] = {}
    for number, stage in enumerate(stages):
        seen, weights, lengths, longest = stage_rows(
            folder, training, samples, stage, composite, parts, features, tokens_per_batch
        )
        results[stage["name"]] = run_stage(
            folder,
            composite,
            parts,
            Collator(
                seen,
                features.features if cache_folder else lambda kind, key: features.prepared(kind, key).values,
                field="features" if cache_folder else "media",
                packed=packed,
                pad_token_id=parts.tokenizer.pad_token_id,
            ),
            plan_rows(longest, weights, capacity=tokens_per_batch, epochs=stage["epochs"], seed=seed + 1000 * number),
            lengths,
            stage,
            accumulate=accumulate,
            save_every_n_steps=save_every_n_steps,
            workers=workers,
            seed=seed,
        )
    trained_seconds = perf_counter() - begin
    if first:
        labels = sorted({entry.sample.answer for entry in training})
        with whole_folder(folder.adapter) as partial:
            adapter.save_adapter_folder(
                composite,
                parts.tokenizer,
                partial,
                base=base_names(model, composite, parts),
                seed=seed,
                labels=labels if len(labels) <= 1000 else [],
                media=asdict(limits),
            )
    PartialState().wait_for_everyone()
    # Cached, media are decoded and encoded before the LLM trains; otherwise in between.
    seconds = {**features.seconds, "encode": features.seconds["encode"] + composite.encode_seconds}
    seconds["llm"] = trained_seconds - (0.0 if cache_folder else seconds["decode"] + seconds["encode"])
    return {
        "stages": results,
        "rows": len(training),
        "tokens_per_epoch": sum(len(ids) for ids in samples["input_ids"]),
        "packed": packed,
        "seconds": seconds,
    }


def run_stage(
    folder: RunFolder,
    model: MultimodalModel,
    parts: Parts,
    collator: Collator,
    rows: Sequence[Sequence[int]],
    lengths: Sequence[int],
    stage: Mapping[str, Any],
    *,
    accumulate: int,
    save_every_n_steps: int,
    workers: int,
    seed: int,
) -> dict[str, Any]:
    """One stage, or what is left of it. Returns its losses (one a step), steps, tokens and seconds."""
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
    begin = perf_counter()
    try:
        log = train_stage(
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
            callbacks=[TrainingBar(stage["name"], steps)],
            distill_temperature=stage["distill"]["temperature"] if stage["distill"] else None,
            # The first of the warmup's steps has a rate of zero: too much where the whole stage is a few steps.
            warmup=stage["warmup"] if stage["warmup"] * steps >= 1 else 0.0,
            **{
                key: value
                for key, value in stage.items()
                if key not in {"name", "trains", "epochs", "sources", "distill", "warmup"}
            },
        )
    except Interrupted as error:
        raise Interrupted(
            f"{stage['name']}: {error}; go on with --resume --run {folder.path}, and the same --set"
        ) from None
    result = {
        "losses": [round(entry["loss"], 6) for entry in log],
        "token_accuracy": [round(entry["mean_token_accuracy"], 4) for entry in log],
        "steps": steps,
        "samples": sum(len(row) for row in rows),
        "tokens": sum(lengths[number] for row in rows for number in row),
        "seconds": perf_counter() - begin,
        "trained_weights": trained,
    }
    final = folder.checkpoints / stage["name"] / "final"
    if processes.is_main_process:
        with whole_folder(final) as partial:
            adapter.save_trained(model, partial)
            write_json(partial / "result.json", result)
        for old in final.parent.glob("checkpoint-*"):
            shutil.rmtree(old)
    processes.wait_for_everyone()
    return result


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
    digest = hashlib.sha256(json.dumps([samples["input_ids"][:], samples["media_keys"][:]]).encode()).hexdigest()
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
