"""What can't work together in a recipe, though each value alone is right."""

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from finetune.common.registry import load_part
from finetune.recipe.schema import Model, Recipe
from finetune.recipe.words import Location, Problem, nearest, seen, shorten

COMMIT = re.compile(r"[0-9a-f]{40}")


def model_conflicts(model: Model) -> Iterator[Problem]:
    if model.llm.trust_remote_code and not COMMIT.fullmatch(model.llm.revision or ""):
        message = f"needs model.llm.revision to be a commit of 40 hex digits; it is {seen(model.llm.revision)}."
        yield ("model", "llm", "trust_remote_code"), message
    taken = _media(model)
    orphans = model.projectors.keys() - taken
    for name, encoder in model.encoders.items():
        medium = load_part("encoders", encoder.kind).MEDIUM
        if medium != name:
            yield ("model", "encoders", name), f"{encoder.kind!r} takes the medium {medium!r}: write encoders.{medium}."
        elif name not in model.projectors and not nearest(name, orphans):
            yield ("model", "encoders", name), f"has no projector: add model.projectors.{name}."
    for name in sorted(orphans):
        near = nearest(name, model.encoders)
        advice = f"Did you mean {near!r}?" if near else f"Add model.encoders.{shorten(name, 40)}."
        yield ("model", "projectors", name), f"no encoder has this name. {advice}"


def _media(model: Model) -> set[str]:
    """The media there are encoders for; one under a wrong name counts under both, so that it is one error."""
    return {*model.encoders, *(load_part("encoders", encoder.kind).MEDIUM for encoder in model.encoders.values())}


def data_conflicts(recipe: Recipe) -> Iterator[Problem]:
    media = _media(recipe.model)
    firsts: dict[tuple[str, str], int] = {}
    for index, source in enumerate(recipe.data):
        task_options: Any = source.task.options  # the task's own class: it has `media`, see data/tasks/__init__.py
        for medium in task_options.media:
            if medium not in media:
                there = ", ".join(recipe.model.encoders) or "none"
                yield (
                    ("data", index, "task"),
                    f"{source.task.kind!r} needs an encoder for {medium!r}; encoders: {shorten(there)}.",
                )
        # Another sheet of the file, or split of the dataset, is other rows.
        chosen = source.format.options.model_dump_json(exclude_defaults=True) if source.format else "{}"
        first = firsts.setdefault((os.path.realpath(source.path), chosen), index)
        other = recipe.data[first]
        if other.split != source.split:
            message = f"also data.{first}, with split {other.split}; the same rows can't be in {source.split} too."
            yield ("data", index, "path"), message
        for key in ("hold_out", "hold_out_validation", "group"):
            if (there := getattr(other, key)) != getattr(source, key) and other.split == source.split:
                message = f"also data.{first}, with {key} {there}: give both the same, or rows held out leak."
                yield ("data", index, "path"), message
    splits = {source.split for source in recipe.data}
    held_out = {"test": "hold_out", "validation": "hold_out_validation"}
    if "train" not in splits:
        yield ("data",), "no source has split train: there is nothing to train on."
    seen_in = splits | {split for split, key in held_out.items() if any(getattr(s, key) for s in recipe.data)}
    if (split := recipe.evaluate.split) not in seen_in:
        advice = f"a source with split: {split}, or {held_out[split]}: 0.1 on one"
        written = "split" in recipe.evaluate.model_fields_set
        yield ("evaluate", "split") if written else ("data",), f"no rows to evaluate on: add {advice}."
    if recipe.train.validation and "validation" not in seen_in:
        advice = "add a source with split: validation, or hold_out_validation: 0.1 on one."
        yield ("train", "validation"), f"no rows to look at: {advice}"


def head_conflicts(recipe: Recipe) -> Iterator[Problem]:
    """Rows that ask the same are answered by the same head, and a head with weights learns from some of them."""
    asked = [(source.name, source.task.kind, source.task.options.model_dump_json()) for source in recipe.data]
    names = source_names(asked)
    for index, (name, kind, _) in enumerate(asked):
        if name is not None and name != names[index]:
            other = names.index(names[index])
            message = f"rows that ask the same {kind!r} are called {names[index]!r} in data.{other}: one name for both."
            yield ("data", index, "name"), message
    learnt = {names[i]: i for i, source in reversed([*enumerate(recipe.data)]) if source.split == "train"}
    for index, source in enumerate(recipe.data):
        where: Location = ("data", index, "head")
        trained = load_part("heads", source.head.kind).TRAINED
        heads = load_part("tasks", source.task.kind).HEADS
        if source.head.kind not in heads:
            yield where, f"{source.head.kind!r} can't answer the task {source.task.kind!r}: write {' or '.join(heads)}."
        elif getattr(source.head.options, "loss", "") == "pairwise" and not hasattr(source.task.options, "group"):
            yield where, f"pairwise compares rows of a group, and the task {source.task.kind!r} has none: write 'rank'."
        elif (first := learnt.get(names[index])) is None:
            if trained or getattr(source.head.options, "answers", "") == "labels":
                yield where, "no training rows ask the same: there is nothing to learn its answers from."
        elif recipe.data[first].head != source.head:
            kind = recipe.data[first].head.kind
            yield where, f"rows that ask the same have another head in data.{first} ({kind!r}): write the same."
        elif trained and source.split == "train":
            if not any("heads" in stage.trains for stage in recipe.train.stages):
                yield where, f"{source.head.kind!r} has weights that no stage trains: add 'heads' to the trains of one."
            for stage in recipe.train.stages:
                if stage.distill and (stage.sources is None or index in stage.sources):
                    yield where, f"stage {stage.name!r} distills, which is for what the LLM writes: leave it out there."
    metric = recipe.train.validation.metric if recipe.train.validation else "mean"
    if metric != "mean" and metric.partition(".")[0] not in names:
        here: Location = ("train", "validation", "metric")
        yield here, f"got {seen(metric)}; its first part is one of {', '.join(dict.fromkeys(names))}."


def source_names(asked: Sequence[tuple[str | None, str, str]]) -> list[str]:
    """(name or None, kind of task, its options as text) of each source -> what its scores are called. Sources that ask
    the same have one name: one that a source gives, or that of their task, with a number where there are several of
    that kind.
    """
    given = {(kind, options): name for name, kind, options in asked if name}
    names: dict[tuple[str, str], str] = {}
    for _, kind, options in asked:
        if (kind, options) not in names:
            same = sum(other == kind for other, _ in names.keys() - given.keys())
            names[kind, options] = given.get((kind, options)) or (f"{kind}_{same + 1}" if same else kind)
    return [names[kind, options] for _, kind, options in asked]


def tuning_conflicts(recipe: Recipe) -> Iterator[Problem]:
    for name, how in recipe.tune_encoders.items():
        if name not in recipe.model.encoders:
            yield ("tune_encoders", name), "no encoder has this name."
        elif (how.last_layers is None) == (how.rank is None):
            yield ("tune_encoders", name), "write last_layers, or rank for LoRA: one of them."
        elif not any({"encoders", f"encoders.{name}"} & {*stage.trains} for stage in recipe.train.stages):
            yield ("tune_encoders", name), f"no stage trains it: add 'encoders.{name}' to the trains of one."
    if recipe.tune_encoders and recipe.train.cache:
        yield (
            ("train", "cache"),
            "keeps what frozen encoders say, but tune_encoders lets one change: set train.cache: false.",
        )


def stage_conflicts(recipe: Recipe) -> Iterator[Problem]:
    there = _trainable(recipe)
    names: dict[str, int] = {}
    for index, stage in enumerate(recipe.train.stages):
        here: Location = ("train", "stages", index)
        if (first := names.setdefault(stage.name, index)) != index:
            yield (*here, "name"), f"{seen(stage.name)} is train.stages.{first} already: give each its own name."
        for number, target in enumerate(stage.trains):
            where = (*here, "trains", number)
            if target == "adapter" and recipe.adapter is None:
                yield where, "'adapter' can't be trained: adapter is null."
            elif target not in there:
                near = nearest(target, there)
                advice = f" Did you mean {near!r}?" if near else ""
                if target.partition(".")[0] == "encoders":
                    advice = " An encoder that trains stands in tune_encoders."
                yield where, f"got {seen(target)}; write one of {shorten(', '.join(there), 120)}.{advice}"
            elif target in stage.trains[:number]:
                yield where, f"{seen(target)} is written twice."
            elif target.partition(".")[0] in stage.trains and "." in target:
                group = target.partition(".")[0]
                yield where, f"{seen(target)} is one of {group}, which is written too: keep one."
        for target, rate in stage.learning_rates.items():
            where = (*here, "learning_rates", target)
            if target not in there or not (target in stage.trains or target.partition(".")[0] in stage.trains):
                yield where, f"this stage doesn't train it; it trains {', '.join(stage.trains)}."
            elif rate <= 0:
                yield where, f"got {rate:g}; write a number above 0."
        training = [i for i, source in enumerate(recipe.data) if source.split == "train"]
        for number, source in enumerate(stage.sources or []):
            if source not in training:
                there_are = ", ".join(map(str, training))
                yield (*here, "sources", number), f"got {source}; write numbers of training sources: {there_are}."
        if stage.distill:
            if "heads" in stage.trains:
                yield (*here, "trains"), "this stage distills, which is for what the LLM writes: heads learn nothing."
            for number in stage.sources or training:
                if number in training and getattr(recipe.data[number].task.options, "transcript", None) == "":
                    message = f"stage {stage.name!r} distills: name the column of what the media show or say."
                    yield ("data", number, "task", "transcript"), message
    fusion = recipe.model.fusion.kind
    if load_part("fusion", fusion).TRAINED and "fusion" not in recipe.train.stages[0].trains:
        yield (
            ("train", "stages", 0, "trains"),
            f"the fusion {fusion!r} begins as if it weren't there, so that nothing else is reached: add 'fusion'.",
        )


def _trainable(recipe: Recipe) -> list[str]:
    """What a stage of this recipe may train."""
    projectors = [f"projectors.{name}" for name in recipe.model.projectors]
    encoders = [f"encoders.{name}" for name in recipe.tune_encoders]
    return [
        *(["projectors", *projectors] if projectors else []),
        *(["fusion"] if load_part("fusion", recipe.model.fusion.kind).TRAINED else []),
        *(["adapter"] if recipe.adapter else []),
        *(["heads"] if any(load_part("heads", source.head.kind).TRAINED for source in recipe.data) else []),
        *(["encoders", *encoders] if encoders else []),
    ]
