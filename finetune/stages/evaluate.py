"""Evaluate: answers on held-out rows, scored by their tasks; the same rows untrained, with blank and with shuffled
media, and a linear probe on the same features beside them.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from torch import Tensor

from finetune import adapter, plots
from finetune.assemble import Features, build_model, encode_one, load_parts
from finetune.assistant import Assistant, Look
from finetune.data.rows import Entry, Source, read_splits, some
from finetune.data.sample import Medium
from finetune.errors import DataError
from finetune.media import Limits, blank, decode
from finetune.parts import load_part
from finetune.progress import bar, console, fresh_memory, peak_memory_bytes, quiet_libraries
from finetune.recipe import load_recipe
from finetune.run_folder import RunFolder, refuse_several_processes, write_text
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
        seconds={"evaluate": perf_counter() - begin},
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
    parts = load_parts(**model, seed=seed)
    features = Features(parts.encoders, cache_folder, limits)
    composite = build_model(
        parts,
        llm=model["llm"],
        adapter_options=adapter_options,
        seed=seed,
        with_encoders=bool(parts.tuned),
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
    with bar("answers", len(entries) * (1 + len(looks))) as step:

        def answers(look: Look) -> list[str]:
            found: list[str] = []
            for start in range(0, len(entries), batch):
                chunk = entries[start : start + batch]
                questions = [entry.sample.question for entry in chunk]
                found += assistant.answers(questions, max_new_tokens=max_new_tokens, look=look)
                for _ in chunk:
                    step()
            return found

        given = {"base": answers(true)}  # as composed: new projectors, an adapter that changes nothing yet
        adapter.load_trained(composite, folder.adapter)
        given |= {condition: answers(look) for condition, look in looks.items()}
    given = {condition: given[condition] for condition in ("tuned", "base", *list(looks)[1:])}
    return score_answers(given, entries, splits["train"], sources, true.features)


def score_answers(
    given: Mapping[str, Sequence[str]],
    entries: Sequence[Entry],
    train: Sequence[Entry],
    sources: Sequence[Source],
    look: Callable[[Medium], Tensor],
) -> dict[str, Any]:
    """{"scores": as in metrics.json, "predictions": a row per entry}, from {condition: an answer per entry}.

    `train` and `look` are for the probe: the training rows, and the features of their media.
    """
    scores: dict[str, Any] = {}
    rows: list[dict[str, Any]] = [{} for _ in entries]
    for name, numbers in by_task(entries, sources).items():
        kind, options = sources[entries[numbers[0]].source].task
        task = load_part("tasks", kind)
        targets = [entries[i].sample.answer for i in numbers]
        table: dict[str, dict[str, float | None]] = {}
        for condition in given:
            read = [task.read(given[condition][i], options) for i in numbers]
            for metric, value in task.score(read, targets, options).items():
                table.setdefault(metric, {})[condition] = round(value, 4)
            for i, prediction in zip(numbers, read, strict=True):
                rows[i][condition] = prediction
        probed = probe(train, [entries[i] for i in numbers], sources, name, look)
        scored = task.score(probed, targets, options) if probed is not None else {}
        for metric in table:
            table[metric]["probe"] = round(scored[metric], 4) if metric in scored else None
        scores[name] = table
        for i in numbers:
            sample = entries[i].sample
            rows[i] = {
                "task": name,
                "row": sample.where,
                "media": [str(medium.path) for medium in sample.media],
                "kinds": [medium.kind for medium in sample.media],
                "question": " ".join(p for m in sample.question for p in m.content if isinstance(p, str)),
                "target": sample.answer,
                **rows[i],
            }
    return {"scores": scores, "predictions": rows}


def by_task(entries: Sequence[Entry], sources: Sequence[Source]) -> dict[str, list[int]]:
    """{name of the scores: numbers of the entries}. Sources that ask the same have their scores together, under the
    name that one of them gives, or that of their task, with a number where there are several of that kind.
    """
    given = {task_key(source): source.name for source in sources if source.name}
    names: dict[tuple[str, str], str] = {}
    result: dict[str, list[int]] = {}
    for number, entry in enumerate(entries):
        key = task_key(sources[entry.source])
        if key not in names:
            same = sum(kind == key[0] for kind, _ in names.keys() - given.keys())
            names[key] = given.get(key) or (f"{key[0]}_{same + 1}" if same else key[0])
        result.setdefault(names[key], []).append(number)
    return result


def task_key(source: Source) -> tuple[str, str]:
    """Equal where the same is asked."""
    kind, options = source.task
    return kind, options.model_dump_json()


def look_of(features: Features) -> Look:
    return Look(features.layout, lambda medium: features.features(medium.kind, features.key(medium)))


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


def probe(
    train: Sequence[Entry],
    test: Sequence[Entry],
    sources: Sequence[Source],
    name: str,
    look: Callable[[Medium], Tensor],
) -> list[str] | None:
    """What logistic regression on mean-pooled features makes of the same rows: the mark to reach.

    Regularisation is chosen by cross-validation on the training rows. None where answers aren't a set of labels, or
    rows don't have media of the same kinds in the same order.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    same = by_task([*test, *train], sources)[name]
    rows = [train[i - len(test)] for i in same if i >= len(test)]
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
