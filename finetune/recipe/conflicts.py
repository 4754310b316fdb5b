"""Conflicts between keys of a recipe whose values are right one by one."""

import os
import re
from collections.abc import Iterator

from finetune.common.registry import nearest
from finetune.recipe.schema import Model, RecipeSections, Source, Stage, task_names
from finetune.recipe.words import Location, Problem, describe, shorten

COMMIT = re.compile(r"[0-9a-f]{40}")
MEDIA = ("image", "audio", "video")
VLLM_RANK = 512  # the largest
HOLD_OUT_KEYS = {"validation": "hold_out_validation", "test": "hold_out"}


def conflicts(recipe: RecipeSections) -> Iterator[Problem]:
    yield from _model_conflicts(recipe.model)
    yield from _source_conflicts(recipe)
    yield from _split_conflicts(recipe)
    yield from _head_conflicts(recipe)
    yield from _tuning_conflicts(recipe)
    yield from _dequantize_conflicts(recipe)
    yield from _stage_conflicts(recipe)


def _model_conflicts(model: Model) -> Iterator[Problem]:
    if model.base is not None:
        yield from _base_conflicts(model)
        return
    llm = model.language_model
    if llm.trust_remote_code and not COMMIT.fullmatch(llm.revision or ""):
        message = f"needs model.llm.revision to be a commit of 40 hex digits; it is {describe(llm.revision)}."
        yield Problem(("model", "llm", "trust_remote_code"), message)
    unmatched = model.projectors.keys() - _media(model)
    for name, encoder in model.encoders.items():
        where: Location = ("model", "encoders", name)
        medium = encoder.medium
        if medium != name:
            yield Problem(where, f"{encoder.kind!r} takes the medium {medium!r}: write encoders.{medium}.")
        elif name not in model.projectors and not nearest(name, unmatched):
            yield Problem(where, f"has no projector: add model.projectors.{name}.")
    for name in sorted(unmatched):
        near = nearest(name, model.encoders)
        advice = f"Did you mean {near!r}?" if near else f"Add model.encoders.{shorten(name, 40)}."
        yield Problem(("model", "projectors", name), f"no encoder has this name. {advice}")


def _base_conflicts(model: Model) -> Iterator[Problem]:
    for key in ("encoders", "projectors"):
        if getattr(model, key):
            yield Problem(("model", key), f"model.base has its own {key}: leave these out.")
    if "fusion" in model.model_fields_set and model.fusion.kind != "prefix":
        yield Problem(("model", "fusion"), "model.base has its own way to read media: leave it out.")
    if model.language_model.name.endswith(".gguf"):
        yield Problem(("model", "base", "name"), "got a .gguf file; write a folder or Hub id of safetensors.")


def _media(model: Model) -> set[str]:
    """The media that have encoders. One under a wrong name counts under both names, so that it is reported once."""
    return {*model.encoders, *(encoder.medium for encoder in model.encoders.values())}


def _source_conflicts(recipe: RecipeSections) -> Iterator[Problem]:
    """Media without an encoder; rows that an earlier source has too."""
    media = _media(recipe.model)
    firsts: dict[tuple[str, str], int] = {}
    for index, source in enumerate(recipe.data):
        for medium in source.task.media:
            if medium not in media and recipe.model.base is None:  # a base's own are known from its config
                encoders = shorten(", ".join(recipe.model.encoders) or "none")
                takes = ", ".join(sorted(media & {encoder.medium for encoder in recipe.model.encoders.values()}))
                message = (
                    f"{source.task.kind!r} needs an encoder for {medium!r}; encoders: {encoders}. If its rows hold "
                    f"{takes or 'text alone'}, write {{kind: {source.task.kind}, media: [{takes}]}}."
                )
                yield Problem(("data", index, "task"), message)
        # Another sheet of the file, or split of the dataset, has other rows.
        options = source.format.options.model_dump_json(exclude_defaults=True) if source.format else "{}"
        first = firsts.setdefault((os.path.realpath(source.path), options), index)
        other, where = recipe.data[first], ("data", index, "path")
        if other.split != source.split:
            message = f"also data.{first}, with split {other.split}; the same rows can't be in {source.split} too."
            yield Problem(where, message)
            continue
        for key in ("hold_out", "hold_out_validation", "group"):
            if (value := getattr(other, key)) != getattr(source, key):
                yield Problem(where, f"also data.{first}, with {key} {value}: make both equal, or held-out rows leak.")


def _split_conflicts(recipe: RecipeSections) -> Iterator[Problem]:
    splits = {source.split for source in recipe.data}
    if "train" not in splits:
        yield Problem(("data",), "no source has split train: there is nothing to train on.")
    with_rows = splits | {split for split, key in HOLD_OUT_KEYS.items() if any(getattr(s, key) for s in recipe.data)}
    if (split := recipe.evaluate.split) not in with_rows:
        location: Location = ("evaluate", "split") if "split" in recipe.evaluate.model_fields_set else ("data",)
        yield Problem(location, f"no rows to evaluate on: {_add_rows(split)}.")
    if recipe.train.validation and "validation" not in with_rows:
        yield Problem(("train", "validation"), f"no validation rows: {_add_rows('validation')}.")


def _add_rows(split: str) -> str:
    return f"add a source with split: {split}, or {HOLD_OUT_KEYS[split]}: 0.1 to one"


def _head_conflicts(recipe: RecipeSections) -> Iterator[Problem]:
    """Sources with the same task and options share a name and a head, which learns from the training rows."""
    names = task_names(recipe.data)
    training = {names[i]: i for i, source in reversed([*enumerate(recipe.data)]) if source.split == "train"}
    for index, (name, source) in enumerate(zip(names, recipe.data, strict=True)):
        task, head = source.task, source.head
        if source.name not in (None, name):
            other_index = next(number for number, other in enumerate(recipe.data) if other.name == name)
            message = f"data.{other_index} has the same task {task.kind!r} and is called {name!r}: use one name."
            yield Problem(("data", index, "name"), message)
        where: Location = ("data", index, "head")
        trained, heads = head.trained, task.heads
        if head.kind not in heads:
            yield Problem(where, f"{head.kind!r} can't answer the task {task.kind!r}: write {' or '.join(heads)}.")
        elif getattr(head.options, "loss", "") == "pairwise" and not hasattr(task.options, "group"):
            yield Problem(where, f"pairwise compares rows of a group, and {task.kind!r} has none: use the task 'rank'.")
        elif (first := training.get(name)) is None:
            if trained or getattr(head.options, "answers", "") == "labels":
                message = "no training rows have this task: there is nothing to learn its answers from."
                yield Problem(where, message + _nearly_trained(recipe, source))
        elif (other := recipe.data[first].head) != head:
            yield Problem(where, f"data.{first} has the same task with another head ({other.kind!r}): make both equal.")
        elif trained and source.split == "train":
            if not any("heads" in stage.trains for stage in recipe.train.stages):
                yield Problem(where, f"{head.kind!r} has weights that no stage trains: add 'heads' to one.")
            for stage in recipe.train.stages:
                if not stage.objective.heads and (stage.sources is None or index in stage.sources):
                    message = (
                        f"stage {stage.name!r} has the objective {stage.objective.kind!r}, which needs the head "
                        "'language': write its sources."
                    )
                    yield Problem(where, message)
    metric = recipe.train.validation.metric if recipe.train.validation else "mean"
    if metric != "mean" and metric.partition(".")[0] not in names:
        message = f"got {describe(metric)}; its first part is one of {', '.join(dict.fromkeys(names))}."
        yield Problem(("train", "validation", "metric"), message)


def _nearly_trained(recipe: RecipeSections, source: Source) -> str:
    """Which options differ from those of training rows of such a task; '' if there are none."""
    for number, other in enumerate(recipe.data):
        if other.split == "train" and other.task.kind == source.task.kind:
            here, there = (one.task.options.model_dump(mode="json") for one in (source, other))
            keys = [key for key in here if here[key] != there[key]]
            differing = ", ".join(f"{key}: {describe(there[key])} there, {describe(here[key])} here" for key in keys)
            return f" data.{number} has the task with other options ({differing}): make them equal."
    return ""


def _tuning_conflicts(recipe: RecipeSections) -> Iterator[Problem]:
    for name, tuning in recipe.tune_encoders.items():
        where: Location = ("tune_encoders", name)
        if name not in (MEDIA if recipe.model.base else recipe.model.encoders):
            yield Problem(where, "no encoder has this name.")
        elif (tuning.last_layers is None) == (tuning.rank is None):
            yield Problem(where, "write either last_layers, or rank for LoRA.")
        elif not any({"encoders", f"encoders.{name}"} & {*stage.trains} for stage in recipe.train.stages):
            yield Problem(where, f"no stage trains it: add 'encoders.{name}' to the trains of one.")
    if recipe.tune_encoders and recipe.train.cache is True:
        message = "stores features of frozen encoders, but tune_encoders trains one: set train.cache: false."
        yield Problem(("train", "cache"), message)
    elif recipe.trains_base_projectors and recipe.train.cache is True:
        message = "stores projected features, but a stage trains projectors of model.base: set train.cache: false."
        yield Problem(("train", "cache"), message)


def _dequantize_conflicts(recipe: RecipeSections) -> Iterator[Problem]:
    where: Location = ("train", "dequantize_once")
    if not recipe.train.dequantize_once:
        return
    if (quantize := recipe.model.language_model.quantize) != "nf4":
        yield Problem(where, f"is for an LLM in nf4; {recipe.model.language_key}.quantize is {quantize!r}.")
    beginning = recipe.adapter.initialization if recipe.adapter else "default"
    if beginning not in ("default", "gaussian"):  # it would change weights that aren't those of the LLM in nf4
        yield Problem(where, f"is for LoRA that begins with zeros; adapter.initialization is {beginning!r}.")


def _stage_conflicts(recipe: RecipeSections) -> Iterator[Problem]:
    names: dict[str, int] = {}
    training = [index for index, source in enumerate(recipe.data) if source.split == "train"]
    for index, stage in enumerate(recipe.train.stages):
        where: Location = ("train", "stages", index)
        if (first := names.setdefault(stage.name, index)) != index:
            message = f"{describe(stage.name)} is train.stages.{first} already: give each its own name."
            yield Problem((*where, "name"), message)
        yield from _target_conflicts(recipe, stage, where)
        for number, source in enumerate(stage.sources or []):
            if source not in training:
                message = f"got {source}; write numbers of training sources: {', '.join(map(str, training))}."
                yield Problem((*where, "sources", number), message)
        if not stage.objective.heads and "heads" in stage.trains:
            message = f"the objective {stage.objective.kind!r} is for the LLM alone: heads learn nothing."
            yield Problem((*where, "trains"), message)
        if stage.objective.samples_answers:
            yield from _sampling_conflicts(recipe, stage, where)
        if stage.objective.needs == "texts":
            for source in stage.sources or training:
                if source in training and getattr(recipe.data[source].task.options, "transcript", None) == "":
                    message = f"stage {stage.name!r} distills: name the column of the captions or transcripts."
                    yield Problem(("data", source, "task", "transcript"), message)
    fusion = recipe.model.fusion
    if fusion.trained and "fusion" not in recipe.train.stages[0].trains:
        message = f"the fusion {fusion.kind!r} starts closed, so nothing else gets a gradient: add 'fusion'."
        yield Problem(("train", "stages", 0, "trains"), message)


def _sampling_conflicts(recipe: RecipeSections, stage: Stage, where: Location) -> Iterator[Problem]:
    """What a stage needs that samples answers."""
    kind = stage.objective.kind
    if "adapter" not in stage.trains:
        message = f"the objective {kind!r} changes what the LLM writes: add 'adapter'."
        yield Problem((*where, "trains"), message)
    if recipe.train.skip_bad_rows:
        message = f"stage {stage.name!r} has the objective {kind!r}, whose sampled answers aren't rows: leave it out."
        yield Problem(("train", "skip_bad_rows"), message)
    for number, source in enumerate(recipe.data):
        labels = getattr(source.head.options, "answers", "") == "labels"
        if source.split == "train" and labels and (stage.sources is None or number in stage.sources):
            message = (
                f"stage {stage.name!r} has the objective {kind!r}, which needs written answers: leave `answers` out."
            )
            yield Problem(("data", number, "head", "answers"), message)
    if stage.objective.sampled_by_vllm and (reason := _unfit_for_vllm(recipe)):
        yield Problem((*where, "objective", "sampler"), f"vllm can't sample: {reason}. Leave it out.")


def _unfit_for_vllm(recipe: RecipeSections) -> str | None:
    """Why vLLM can't be the LLM that a recipe trains, given embeddings and a plain LoRA; None if it can."""
    adapter = recipe.adapter
    if recipe.model.fusion.kind != "prefix":
        return f"it has no place for the fusion {recipe.model.fusion.kind!r}"
    if recipe.model.language_model.trust_remote_code:
        return "the LLM needs code of its own, which vLLM isn't given"
    if adapter is not None and adapter.dora:
        return "it takes no DoRA (adapter.dora)"
    if adapter is not None and adapter.rank > VLLM_RANK:
        return f"it takes LoRA up to rank {VLLM_RANK} (adapter.rank)"
    return None


def _target_conflicts(recipe: RecipeSections, stage: Stage, where: Location) -> Iterator[Problem]:
    targets = _targets(recipe)
    for number, target in enumerate(stage.trains):
        here, group = (*where, "trains", number), target.partition(".")[0]
        if target == "adapter" and recipe.adapter is None:
            yield Problem(here, "'adapter' can't be trained: adapter is null.")
        elif target not in targets:
            near = nearest(target, targets)
            advice = f" Did you mean {near!r}?" if near else ""
            if group == "encoders":
                advice = " Encoders to train are listed in tune_encoders."
            message = f"got {describe(target)}; write one of {shorten(', '.join(targets), 120)}.{advice}"
            yield Problem(here, message)
        elif target in stage.trains[:number]:
            yield Problem(here, f"{describe(target)} is written twice.")
        elif target != group and group in stage.trains:
            yield Problem(here, f"{describe(target)} is one of {group}, which is written too: keep one.")
    for target, rate in stage.learning_rates.items():
        here = (*where, "learning_rates", target)
        if target not in targets or not {target, target.partition(".")[0]} & {*stage.trains}:
            yield Problem(here, f"this stage doesn't train it; it trains {', '.join(stage.trains)}.")
        elif rate <= 0:
            yield Problem(here, f"got {rate:g}; write a number above 0.")


def _targets(recipe: RecipeSections) -> list[str]:
    """What the stages of this recipe may train."""
    projectors = [f"projectors.{name}" for name in (MEDIA if recipe.model.base else recipe.model.projectors)]
    encoders = [f"encoders.{name}" for name in recipe.tune_encoders]
    return [
        *(["projectors", *projectors] if projectors else []),
        *(["fusion"] if recipe.model.fusion.trained else []),
        *(["adapter"] if recipe.adapter else []),
        *(["heads"] if any(source.head.trained for source in recipe.data) else []),
        *(["encoders", *encoders] if encoders else []),
    ]
