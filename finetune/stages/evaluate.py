"""Evaluate: answers on held-out rows, scored by their tasks; the same rows untrained, with blank and with shuffled
media, and a linear probe on the same features beside them.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from torch import Tensor

from finetune import adapter, plots
from finetune.assemble import Features, build_model, encode_one, load_parts
from finetune.assistant import Assistant, Look
from finetune.data.asks import Ask, name_of
from finetune.data.rows import Entry, Source, read_splits, some
from finetune.data.sample import Answer, Medium
from finetune.energy import EnergyMeter
from finetune.errors import DataError
from finetune.media import Limits, blank, decode
from finetune.metrics.bootstrap import intervals
from finetune.parts import load_part
from finetune.progress import bar, console, fresh_memory, peak_memory_bytes, quiet_libraries
from finetune.recipe import load_recipe
from finetune.run_folder import RunFolder, refuse_several_processes, write_text
from finetune.scores import answers_to, by_name, known_asks, look_of, measured, told
from finetune.sources import adapter_options, cache_folder, limits_of, model_arguments, sources_of

BLANKS_KEPT = 64
PROBED_LABELS = 200  # with more different answers than this, they aren't labels


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


def same_as(condition: str, entry: Entry) -> str | None:
    """The condition in which the entry looks the same and was asked before; None where there is none."""
    kinds = {medium.kind for medium in entry.sample.media}
    if condition in ("base", "tuned"):
        return None
    if not kinds:
        return "tuned"
    blanked = condition.removeprefix("blank_")
    if blanked == condition:
        return None
    return "tuned" if blanked not in kinds else "blank" if kinds == {blanked} else None


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


def blank_look(features: Features, only: str | None = None) -> Look:
    """The encoder's view of empty media of the same size or length; `only` those of a kind."""
    true = look_of(features)
    seen: dict[str, Tensor] = {}

    def look(medium: Medium) -> Tensor:
        if only not in (None, medium.kind):
            return true.features(medium)
        encoder = features.encoders[medium.kind]
        where = features.where.get(features.key(medium), "")
        decoded = decode(medium.kind, medium.path, where=where, limits=features.limits, **encoder.sampling)
        prepared = encoder.prepare(blank(medium.kind, decoded))
        # Most blanks are alike: the same grey, the same silence.
        alike = hashlib.sha256(f"{medium.kind}{prepared.values.shape}".encode())
        alike.update(prepared.values.contiguous().numpy().data)
        if alike.hexdigest() not in seen:
            if len(seen) >= BLANKS_KEPT:  # recordings of many lengths
                seen.clear()
            seen[alike.hexdigest()] = encode_one(encoder, prepared).cpu()
        return seen[alike.hexdigest()]

    return Look(features.layout, look)


def shuffled_look(true: Look, media: Sequence[Medium], seed: int) -> Look:
    """Another row's medium in place of each: the media of a kind, moved around a shuffled circle."""
    other: dict[Medium, Medium] = {}
    kinds: dict[str, list[Medium]] = {}
    for medium in dict.fromkeys(media):
        kinds.setdefault(medium.kind, []).append(medium)
    for found in kinds.values():
        order = np.random.default_rng(seed).permutation(len(found))
        for left, right in zip(order, np.roll(order, 1), strict=True):
            other[found[left]] = found[right]
    return Look(lambda medium: true.layout(other[medium]), lambda medium: true.features(other[medium]))


def probe(rows: Sequence[Entry], test: Sequence[Entry], look: Callable[[Medium], Tensor]) -> list[str] | None:
    """What logistic regression on mean-pooled features, learnt from `rows`, makes of the test rows: the mark to reach.

    Regularisation is chosen by cross-validation on the training rows. None where answers aren't a set of labels, or
    rows don't have media of the same kinds in the same order.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = [entry.sample.answer for entry in rows]
    if (
        not 2 <= len(set(labels)) <= PROBED_LABELS
        or len(labels) < 4 * len(set(labels))
        or len({tuple(medium.kind for medium in entry.sample.media) for entry in [*rows, *test]}) != 1
        or not test[0].sample.media
    ):
        return None

    def pooled(entries: Sequence[Entry]) -> np.ndarray:
        means = [[look(m).float().mean((0, 1)).cpu().numpy() for m in entry.sample.media] for entry in entries]
        return np.stack([np.concatenate(row) for row in means])

    console.print(f"linear probe: {len(rows):,} rows, {len(set(labels))} labels")
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)),
        {"logisticregression__C": [0.001, 0.01, 0.1]},
        cv=3,
    )
    return list(search.fit(pooled(rows), labels).predict(pooled(test)))
