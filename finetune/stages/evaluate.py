"""Evaluate: answers on held-out rows, scored by their tasks; the same rows untrained, with blank and with shuffled
media, and a linear probe on the same features beside them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from torch import Tensor

from finetune import adapter, plots
from finetune.assemble import Features, build_model, encode_one, load_parts
from finetune.assistant import Assistant
from finetune.data.rows import Entry, Source, read_splits, some
from finetune.data.sample import Medium
from finetune.errors import DataError
from finetune.media import BLANKS, decode
from finetune.parts import load_part
from finetune.progress import bar, console, fresh_memory, peak_memory_bytes, quiet_libraries
from finetune.recipe import load_recipe
from finetune.run_folder import RunFolder, write_text
from finetune.sources import adapter_options, cache_folder, model_arguments, sources_of

CONDITIONS = ("tuned", "base", "blank", "shuffled")
PROBED_LABELS = 200  # with more different answers than this, they aren't labels


def evaluate(run: Path | str) -> dict[str, Any]:
    """Score a trained run on the rows its recipe names; writes metrics.json, predictions.jsonl and plots/scores.png."""
    quiet_libraries()
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
    split: str,
    limit: int | None,
    max_new_tokens: int,
    batch: int,
) -> dict[str, Any]:
    splits = read_splits(sources, seed)
    entries = some(splits[split], limit, seed)
    if not entries:
        raise DataError(f"no rows in split {split!r} to evaluate on")
    parts = load_parts(**model)
    features = Features(parts.encoders, cache_folder)
    composite = build_model(parts, llm=model["llm"], adapter_options=adapter_options, seed=seed, with_encoders=False)
    assistant = Assistant(
        composite, parts.tokenizer, parts.placeholders, {name: encoder for name, (_, encoder) in parts.encoders.items()}
    )
    for kind, keys in features.missing([medium for entry in entries for medium in entry.sample.media]).items():
        with bar(f"encode {kind}", len(keys)) as step:
            features.fill(kind, keys, step)
    true = features_of(features)
    conditions: dict[str, Callable[[Medium], Tensor]] = {
        "tuned": true,
        "blank": blank_features(features),
        "shuffled": shuffled_features(features, entries, seed),
    }
    with bar("answers", len(entries) * len(CONDITIONS)) as step:

        def answers(look: Callable[[Medium], Tensor]) -> list[str]:
            found: list[str] = []
            for start in range(0, len(entries), batch):
                chunk = entries[start : start + batch]
                found += assistant.answers(
                    [entry.sample.question for entry in chunk], max_new_tokens=max_new_tokens, features=look
                )
                for _ in chunk:
                    step()
            return found

        given = {"base": answers(true)}  # as composed: new projectors, an adapter that changes nothing yet
        adapter.load_trained(composite, folder.adapter)
        given |= {condition: answers(look) for condition, look in conditions.items()}
    return score_answers(given, entries, splits["train"], sources, true)


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
        for condition in CONDITIONS:
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
                "question": " ".join(p for m in sample.question for p in m.content if isinstance(p, str)),
                "target": sample.answer,
                **rows[i],
            }
    return {"scores": scores, "predictions": rows}


def by_task(entries: Sequence[Entry], sources: Sequence[Source]) -> dict[str, list[int]]:
    """{task: numbers of its entries}; sources that ask the same share a task, others of the kind get a number."""
    names: dict[tuple[str, str], str] = {}
    result: dict[str, list[int]] = {}
    for number, entry in enumerate(entries):
        result.setdefault(task_name(sources[entry.source], names), []).append(number)
    return result


def task_name(source: Source, names: dict[tuple[str, str], str]) -> str:
    kind, options = source.task
    same = sum(known == kind for known, _ in names)
    return names.setdefault((kind, options.model_dump_json()), kind if not same else f"{kind}_{same + 1}")


def features_of(features: Features) -> Callable[[Medium], Tensor]:
    return lambda medium: features.features(medium.kind, features.key(medium))


def blank_features(features: Features) -> Callable[[Medium], Tensor]:
    """The encoder's view of an empty medium of the same size."""
    seen: dict[Any, Tensor] = {}

    def look(medium: Medium) -> Tensor:
        blank = BLANKS[medium.kind](decode(medium.kind, medium.path))
        if blank.size not in seen:
            encoder = features.encoders[medium.kind]
            seen[blank.size] = encode_one(encoder, encoder.prepare(blank))
        return seen[blank.size]

    return look


def shuffled_features(features: Features, entries: Sequence[Entry], seed: int) -> Callable[[Medium], Tensor]:
    """Another row's medium in place of each: the media of a kind, moved around a shuffled circle."""
    other: dict[Medium, Medium] = {}
    media: dict[str, list[Medium]] = {}
    for medium in dict.fromkeys(medium for entry in entries for medium in entry.sample.media):
        media.setdefault(medium.kind, []).append(medium)
    for found in media.values():
        order = np.random.default_rng(seed).permutation(len(found))
        for left, right in zip(order, np.roll(order, 1), strict=True):
            other[found[left]] = found[right]
    look = features_of(features)
    return lambda medium: look(other[medium])


def probe(
    train: Sequence[Entry],
    test: Sequence[Entry],
    sources: Sequence[Source],
    name: str,
    look: Callable[[Medium], Tensor],
) -> list[str] | None:
    """What logistic regression on mean-pooled features makes of the same rows: the mark to reach.

    Regularisation is chosen by cross-validation on the training rows. None where answers aren't a set of labels, or
    rows don't have exactly one medium.
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
        or any(len(entry.sample.media) != 1 for entry in [*rows, *test])
    ):
        return None

    def pooled(entries: Sequence[Entry]) -> np.ndarray:
        return np.stack([look(entry.sample.media[0]).float().mean(0).cpu().numpy() for entry in entries])

    console.print(f"linear probe: {len(rows):,} rows, {len(set(labels))} labels")
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)),
        {"logisticregression__C": [0.001, 0.01, 0.1]},
        cv=3,
    )
    return list(search.fit(pooled(rows), labels).predict(pooled(test)))
