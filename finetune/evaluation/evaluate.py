"""Evaluate: answers on held-out rows, scored by their tasks; the same rows untrained, with blank and with shuffled
media, and a linear probe on the same features beside them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor

from finetune.common.energy import EnergyMeter
from finetune.common.errors import DataError
from finetune.common.progress import bar, fresh_memory, peak_memory_bytes, quiet_libraries
from finetune.common.registry import load_part
from finetune.common.run_folder import RunFolder, refuse_several_processes, write_text
from finetune.data.media import Limits
from finetune.data.rows import Entry, Source, read_splits, some
from finetune.data.sample import Answer, Medium
from finetune.data.sources import adapter_options, cache_folder, limits_of, model_arguments, sources_of
from finetune.evaluation import plots
from finetune.evaluation.bootstrap import intervals
from finetune.evaluation.conditions import blank_look, same_as, shuffled_look
from finetune.evaluation.probe import probe
from finetune.evaluation.scores import answers_to, by_name, known_asks, look_of, measured, told
from finetune.model import adapter
from finetune.model.asks import Ask, name_of
from finetune.model.assistant import Assistant, Look
from finetune.model.build import build_model, load_parts
from finetune.model.features import Features
from finetune.recipe.load import load_recipe


def evaluate(run: Path | str) -> dict[str, Any]:
    """Score a trained run on the rows its recipe names; writes metrics.json, predictions.jsonl and plots/scores.png."""
    quiet_libraries()
    refuse_several_processes("`finetune evaluate`")
    fresh_memory()
    folder = RunFolder.open(Path(run), needs="adapter")
    recipe = load_recipe(folder.recipe)
    begin = perf_counter()
    with EnergyMeter() as meter:
        result = evaluate_plain(
            folder,
            sources=sources_of(recipe),
            model=model_arguments(recipe),
            adapter_options=adapter_options(recipe),
            seed=recipe.seed,
            cache_folder=cache_folder(recipe),
            limits=limits_of(recipe),
            **recipe.evaluate.model_dump(),
        )
    folder.update_metrics(
        scores=result["scores"],
        intervals=result["intervals"],
        tables=result["tables"],
        seconds={"evaluate": perf_counter() - begin},
        energy_joules={f"evaluate_{device}": joules for device, joules in meter.joules.items()},
        peak_memory_bytes={f"evaluate_{device}": value for device, value in peak_memory_bytes().items()},
    )
    write_text(folder.predictions, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result["predictions"]))
    plots.scores(result["scores"], folder.plots / "scores.png")
    return folder.read_metrics()


def evaluate_plain(
    folder: RunFolder,
    *,
    sources: Sequence[Source],
    model: Mapping[str, Any],
    adapter_options: Mapping[str, Any] | None,
    seed: int,
    cache_folder: Path | None,
    limits: Limits,
    split: str,
    limit: int | None,
    max_new_tokens: int,
    batch: int,
) -> dict[str, Any]:
    splits = read_splits(sources, seed)
    entries = some(splits[split], limit, seed)
    if not entries:
        raise DataError(f"no rows in split {split!r} to evaluate on")
    asks = known_asks(folder.adapter, entries, sources)
    parts = load_parts(**model, seed=seed)
    features = Features(parts.encoders, cache_folder, limits)
    composite = build_model(
        parts,
        llm=model["llm"],
        adapter_options=adapter_options,
        seed=seed,
        with_encoders=bool(parts.tuned),
        asks=asks,
    )
    assistant = Assistant(composite, parts.tokenizer, parts.placeholders, features.encoders, limits)
    media = [medium for entry in entries for medium in entry.sample.media]
    for entry in entries:
        for medium in entry.sample.media:
            features.key(medium, entry.sample.where)
    for kind, keys in features.missing(media).items():
        if not keys:
            continue
        with bar(f"encode {kind}", len(keys)) as step:
            features.fill(kind, keys, step)
    true = look_of(features)
    looks = {"tuned": true, "blank": blank_look(features), "shuffled": shuffled_look(true, media, seed)}
    kinds = list(dict.fromkeys(medium.kind for medium in media))
    if len(kinds) > 1:  # what does each contribute?
        looks |= {f"blank_{kind}": blank_look(features, kind) for kind in kinds}
    given: dict[str, list[Answer]] = {}
    with bar("answers", len(entries) * (1 + len(looks))) as step:

        def answer(condition: str, look: Look) -> None:
            copied = {i: given[other][i] for i, entry in enumerate(entries) if (other := same_as(condition, entry))}
            asked = [i for i in range(len(entries)) if i not in copied]
            for _ in copied:
                step()
            some = [entries[i] for i in asked]
            how = {"max_new_tokens": max_new_tokens, "batch": batch}
            said = answers_to(assistant, some, sources, look=look, step=step, **how)
            given[condition] = [(copied | dict(zip(asked, said, strict=True)))[i] for i in range(len(entries))]

        answer("base", true)  # as composed: new parts, an adapter that changes nothing yet
        text = {i: entry for i, entry in enumerate(entries) if writes(asks[name_of(sources[entry.source])], entry)}
        surprise = {"base": dict(zip(text, told(assistant, list(text.values())), strict=True))}
        adapter.load_trained(composite, folder.adapter)
        surprise["tuned"] = dict(zip(text, told(assistant, list(text.values())), strict=True))
        for condition, look in looks.items():
            answer(condition, look)
    given = {condition: given[condition] for condition in ("tuned", "base", *list(looks)[1:])}
    return score_answers(given, surprise, entries, splits["train"], sources, asks, true.features, seed)


def score_answers(
    given: Mapping[str, Sequence[Answer]],
    surprise: Mapping[str, Mapping[int, Mapping[str, float]]],
    entries: Sequence[Entry],
    train: Sequence[Entry],
    sources: Sequence[Source],
    asks: Mapping[str, Ask],
    look: Callable[[Medium], Tensor],
    seed: int,
) -> dict[str, Any]:
    """{"scores", "intervals" and "tables" as in metrics.json, "predictions": a row per entry}, from {condition: an
    answer per entry}, and of some conditions and entries what `told` gives.

    `train` and `look` are for the probe: the training rows, and the features of their media.
    """
    result: dict[str, Any] = {"scores": {}, "intervals": {}, "tables": {}}
    rows: list[dict[str, Any]] = [{} for _ in entries]
    for name, numbers in by_name(entries, sources).items():
        kind, options = asks[name].task
        task = load_part("tasks", kind)
        own = [entries[i] for i in numbers]
        conditions = {condition: [said[i] for i in numbers] for condition, said in given.items()}
        if not any(entry.sample.media for entry in own):  # there is nothing to blank or to shuffle
            conditions = {condition: conditions[condition] for condition in ("tuned", "base")}
        elif (probed := probe([e for e in train if name_of(sources[e.source]) == name], own, look)) is not None:
            conditions["probe"] = [Answer(answer) for answer in probed]
        table: dict[str, dict[str, float | None]] = {}
        margins: dict[str, dict[str, list[float]]] = {}
        for condition, answers in conditions.items():
            predictions, measures = measured(asks[name], own, answers)
            for i, measure in zip(numbers, measures, strict=True):
                measure |= surprise.get(condition, {}).get(i, {})
            score = partial(scores_of, task.score, options)
            for metric, value in score(measures).items():
                table.setdefault(metric, {})[condition] = round(value, 4)
            for metric, ends in intervals(measures, score, seed).items():
                margins.setdefault(metric, {})[condition] = [round(end, 4) for end in ends]
            if condition == "tuned" and hasattr(task, "tables"):
                result["tables"][name] = task.tables(measures, options)
            for i, prediction, measure in zip(numbers, predictions, measures, strict=True):
                if condition != "probe":
                    rows[i][condition] = prediction
                if condition == "tuned":
                    rows[i]["good"] = round(float(measure["good"]), 4)
        shown = [*given, "probe"] if "shuffled" in conditions else ["tuned", "base"]
        result["scores"][name] = {m: {c: values.get(c) for c in shown} for m, values in table.items()}
        result["intervals"][name] = margins
        for i, entry in zip(numbers, own, strict=True):
            rows[i] = {**described(name, asks[name], entry), **rows[i]}
    return {**result, "predictions": rows}


def writes(ask: Ask, entry: Entry) -> bool:
    """Whether it is text alone, answered in words."""
    return not entry.sample.media and not ask.trained


def scores_of(score: Callable[..., dict[str, float]], options: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """The task's own, and where rows are told how surprising their right answer is, that per token."""
    found = score(rows, options)
    if rows and all("nats" in row for row in rows):
        found["error_nats_per_token"] = sum(row["nats"] for row in rows) / sum(row["tokens"] for row in rows)
    return found


def described(name: str, ask: Ask, entry: Entry) -> dict[str, Any]:
    """What predictions.jsonl says of a row, beside its predictions."""
    sample = entry.sample
    return {
        "task": name,
        "row": sample.where,
        "media": [str(medium.path) for medium in sample.media],
        "kinds": [medium.kind for medium in sample.media],
        "question": " ".join(p for m in sample.question for p in m.content if isinstance(p, str)),
        "target": ask.target(sample),
    }
