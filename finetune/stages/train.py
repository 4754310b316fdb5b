"""Train: recipe -> rows -> tokens -> features -> packed rows -> the stages, on one loaded LLM -> adapter folder."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from datasets import Dataset

from finetune import adapter, plots
from finetune.assemble import Features, Parts, build_model, lengths_of, load_parts
from finetune.data.collate import Collator
from finetune.data.pack import plan_rows
from finetune.data.rows import Entry, Source, listed, read_splits, summary
from finetune.data.tokenize import tokenize
from finetune.errors import DataError, Interrupted, TrainingError
from finetune.model import MultimodalConfig, MultimodalModel, packs_exactly
from finetune.progress import TrainingBar, bar, console, fresh_memory, peak_memory_bytes, quiet_libraries
from finetune.recipe import Recipe, dump_recipe
from finetune.run_folder import RunFolder, read_json, whole_folder, write_json, write_text
from finetune.sources import adapter_options, cache_folder, model_arguments, sources_of
from finetune.trainer import refuse_several_gpus, train_stage

FEW_STEPS = 50
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")


def train(recipe: Recipe, run: Path | str | None = None, resume: bool = False) -> RunFolder:
    """Train a recipe's stages and write the adapter folder. Ctrl-C leaves a whole checkpoint; `resume` goes on."""
    quiet_libraries()
    fresh_memory()
    folder = RunFolder.create(Path(run or Path("runs") / recipe.name), dump_recipe(recipe), resume)
    tell_versions(folder.path / "versions.json")
    begin = perf_counter()
    result = train_plain(
        folder,
        sources=sources_of(recipe),
        model=model_arguments(recipe),
        adapter_options=adapter_options(recipe),
        stages=[stage.model_dump() for stage in recipe.train.stages],
        seed=recipe.seed,
        cache_folder=cache_folder(recipe),
        **recipe.train.model_dump(exclude={"stages", "cache", "cache_folder"}),
    )
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
    tokens_per_batch: int,
    accumulate: int,
    encode_batch: int,
    workers: int,
    checkpoint_every_n_layers: int,
    save_every_n_steps: int,
) -> dict[str, Any]:
    """The same from plain values. Returns losses and tokens per stage, and seconds per part."""
    refuse_several_gpus()
    entries = read_splits(sources, seed)
    write_json(folder.data / "summary.json", summary(entries))
    parts = load_parts(**model)
    features = Features(parts.encoders, cache_folder)
    samples = tokenized(entries["train"], parts, features, tokens_per_batch)
    refuse_other_rows(folder, samples)
    lengths = [len(ids) for ids in samples["input_ids"]]
    console.print(
        f"{len(lengths):,} rows, {sum(lengths):,} tokens an epoch in rows of {tokens_per_batch:,} "
        f"(one sample: {min(lengths)} to {max(lengths)})"
    )
    if cache_folder:
        epochs = sum(stage["epochs"] for stage in stages)
        media = [medium for entry in entries["train"] for medium in entry.sample.media]
        fill_cache(media, features, epochs, encode_batch)
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
    collator = Collator(
        samples,
        features.features if cache_folder else features.prepared,
        field="features" if cache_folder else "media",
        packed=packed,
        pad_token_id=parts.tokenizer.pad_token_id,
    )
    weights = [entry.weight for entry in entries["train"]]
    begin = perf_counter()
    results = [
        run_stage(
            folder,
            composite,
            parts,
            collator,
            plan_rows(lengths, weights, capacity=tokens_per_batch, epochs=stage["epochs"], seed=seed + 1000 * number),
            lengths,
            stage,
            accumulate=accumulate,
            save_every_n_steps=save_every_n_steps,
            workers=workers,
            seed=seed,
        )
        for number, stage in enumerate(stages)
    ]
    trained_seconds = perf_counter() - begin
    labels = sorted({entry.sample.answer for entry in entries["train"]})
    with whole_folder(folder.adapter) as partial:
        adapter.save_adapter_folder(
            composite,
            parts.tokenizer,
            partial,
            base=base_names(model, composite, parts),
            seed=seed,
            labels=labels if len(labels) <= 1000 else [],
        )
    # Cached, media are decoded and encoded before the LLM trains; otherwise in between.
    seconds = {**features.seconds, "encode": features.seconds["encode"] + composite.encode_seconds}
    seconds["llm"] = trained_seconds - (0.0 if cache_folder else seconds["decode"] + seconds["encode"])
    return {
        "stages": {stage["name"]: result for stage, result in zip(stages, results, strict=True)},
        "rows": len(lengths),
        "tokens_per_epoch": sum(lengths),
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
    steps = -(-len(rows) // accumulate)
    checkpoint = folder.newest_checkpoint(stage["name"])
    if checkpoint is not None and checkpoint.name == "final":
        adapter.load_trained(model, checkpoint)
        console.print(f"{stage['name']}: done before")
        return read_json(checkpoint / "result.json")
    console.print(f"{stage['name']}: trains " + ", ".join(f"{role} ({count:,})" for role, count in trained.items()))
    if steps < FEW_STEPS:
        console.print(
            f"{stage['name']}: only {steps} optimizer steps, hardly enough to learn from: lower train.tokens_per_batch "
            f"or raise train.stages.N.epochs (now {stage['epochs']})"
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
            **{key: value for key, value in stage.items() if key not in {"name", "trains", "epochs"}},
        )
    except Interrupted as error:
        raise Interrupted(f"{stage['name']}: {error}; go on with --resume --run {folder.path}") from None
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
    with whole_folder(final) as partial:
        adapter.save_trained(model, partial)
        write_json(partial / "result.json", result)
    for old in final.parent.glob("checkpoint-*"):
        shutil.rmtree(old)
    return result


def tokenized(entries: Sequence[Entry], parts: Parts, features: Features, limit: int) -> Dataset:
    """Training rows as token ids, labels and keys of their media. Raises DataError with all rows that can't be used."""
    config = MultimodalConfig(
        parts={
            "projectors": {
                name: {"kind": kind, "options": options.model_dump()}
                for name, (kind, options) in parts.projectors.items()
            },
            "fusion": {"kind": parts.fusion[0], "options": parts.fusion[1].model_dump()},
        }
    )
    length = lengths_of(config, parts.encoders)
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "media_kinds": [], "media_keys": []}
    wrong: list[str] = []
    for entry in entries:
        try:
            tokens = tokenize(entry.sample, parts.tokenizer, parts.placeholders, length)
            if len(tokens.input_ids) > limit:
                raise DataError(
                    f"{entry.sample.where}: {len(tokens.input_ids)} tokens, more than a row holds: raise "
                    f"train.tokens_per_batch (now {limit}) or shorten it; a medium is never cut"
                )
        except DataError as error:
            wrong.append(str(error))
            continue
        columns["input_ids"].append(tokens.input_ids)
        columns["labels"].append(tokens.labels)
        columns["media_kinds"].append([medium.kind for medium in tokens.media])
        columns["media_keys"].append([features.key(medium, entry.sample.where) for medium in tokens.media])
    if wrong:
        raise DataError(listed(wrong, f"{len(wrong)} of {len(entries)} training rows can't be used"))
    return Dataset.from_dict(columns)


def fill_cache(media: Sequence[Any], features: Features, epochs: int, encode_batch: int) -> None:
    """Encode what the cache lacks. Says first how large it gets and from which epoch on it pays."""
    for kind, keys in features.missing(media).items():
        if not keys:
            console.print(
                f"features of {kind}: all {len(features.paths):,} in the cache ({features.stores[kind].folder})"
            )
            continue
        first = features.compute(kind, keys[0])[0]  # warms up
        begin = perf_counter()
        features.compute(kind, keys[-1])
        each = perf_counter() - begin
        size = first.nbytes * len(keys)
        free = shutil.disk_usage(existing_parent(features.stores[kind].folder)).free
        console.print(
            f"features of {kind}: {len(keys):,} × {tuple(first.shape)} {str(first.dtype).removeprefix('torch.')} = "
            f"{size / 2**20:,.0f} MiB on disk; encoded once in about {each * len(keys):.0f} s, "
            f"without cache {each * len(keys) * epochs:.0f} s in {epochs} epochs: pays from the second epoch on"
        )
        if size > 0.9 * free:
            raise DataError(
                f"the features need {size / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB are free in "
                f"{features.stores[kind].folder}: set train.cache: false or train.cache_folder"
            )
        with bar(f"encode {kind}", len(keys)) as step:
            features.fill(kind, keys, step, encode_batch)


def tell_versions(path: Path) -> None:
    """Keep the versions that a run began with; say which have changed where it is resumed."""
    now = {name: version(name) for name in PACKAGES}
    before = read_json(path) if path.is_file() else now
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


def existing_parent(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def base_names(model: Mapping[str, Any], composite: MultimodalModel, parts: Parts) -> dict[str, Any]:
    """What the adapter folder must name to be rebuilt: the LLM and the encoders, by the commits that were loaded."""
    llm = {**model["llm"], "revision": commit_of(composite.causal_lm, model["llm"]["revision"])}
    keys = ("name", "revision", "quantize", "double_quantize", "dtype")
    return {
        "language_model": {key: llm[key] for key in keys},
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
