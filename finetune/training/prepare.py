"""What stands ready before the LLM is loaded."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset

from finetune.common.errors import TrainingError
from finetune.common.progress import console
from finetune.common.run_folder import RunFolder, write_json, write_text
from finetune.data.media import Limits
from finetune.data.rows import Entry, Source, read_splits, some, summary
from finetune.evaluation.scores import by_name
from finetune.model.asks import Ask, asks_of, names_of
from finetune.model.build import Parts, load_parts
from finetune.model.features import Features
from finetune.training.feature_cache import fill_cache
from finetune.training.samples import Shared, tokenized


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
