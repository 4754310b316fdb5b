"""What a stage of training reads: rows as token ids, with a teacher's beside them where it distills; features of their
media, computed once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset

from finetune.common.errors import DataError
from finetune.common.progress import bar
from finetune.common.run_folder import RunFolder, read_json, write_json
from finetune.data.media import Limits
from finetune.data.rows import Entry, listed, mixed
from finetune.data.sample import Sample
from finetune.model.asks import Ask
from finetune.model.assistant import Assistant
from finetune.model.build import Parts, composite_config, load_llm, load_parts, segments_by
from finetune.model.composite import MultimodalModel
from finetune.model.features import Features
from finetune.model.language_model import without_adapter
from finetune.model.tokenize import tokenize, tokenize_prompt

COLUMNS = ("input_ids", "labels", "media_kinds", "media_keys", "head", "target", "group")


def tokenized(
    samples: Sequence[Sample],
    parts: Parts,
    features: Features,
    limit: int,
    heads: Sequence[tuple[str, Ask] | None] | None = None,
) -> Dataset:
    """Training rows as token ids, labels and keys of their media. `heads`: (name, what is asked) of those that a head
    with weights answers: they are questions alone, `head` names the head, `target` is what it learns, and samples of
    an equal `group` are compared. Raises DataError with all rows that can't be used.
    """
    segments = segments_by(composite_config(parts), features.layout)
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    wrong: list[str] = []
    for sample, head in zip(samples, heads or [None] * len(samples), strict=True):
        try:
            if head is None:
                tokens, target = tokenize(sample, parts.tokenizer, parts.placeholders, segments), []
            else:
                tokens = tokenize_prompt(sample.question, parts.tokenizer, parts.placeholders, segments, sample.where)
                target = head[1].encode(sample)
            if len(tokens.input_ids) > limit:
                raise DataError(
                    f"{sample.where}: {len(tokens.input_ids)} tokens, more than a row holds: raise "
                    f"train.tokens_per_batch (now {limit}) or shorten it; a medium is never cut"
                )
        except DataError as error:
            wrong.append(str(error))
            continue
        columns["input_ids"].append(tokens.input_ids)
        columns["labels"].append(tokens.labels)
        columns["media_kinds"].append([medium.kind for medium in tokens.media])
        columns["media_keys"].append([features.key(medium, sample.where) for medium in tokens.media])
        columns["head"].append(head[0] if head else "")
        columns["target"].append(target)
        columns["group"].append(sample.group if head else "")
    if wrong:
        raise DataError(listed(wrong, f"{len(wrong)} of {len(samples)} training rows can't be used"))
    return Dataset.from_dict(columns)


@dataclass
class Shared:
    """What several trainings have in common: encoders, features, and the LLM as it came, quantized. `composite`: that
    of the training that has them now.
    """

    parts: Parts
    features: Features
    language_model: Any
    composite: MultimodalModel | None = None

    def give_back(self) -> None:
        """Take a training's adapter and fusion off the LLM."""
        if self.composite is not None:
            self.composite.fusion.detach_layers()
            if hasattr(self.composite.language_model, "peft_config"):
                self.composite.language_model.unload()
            if self.language_model.is_activation_checkpointing:
                self.language_model.activation_checkpointing_disable()
        self.composite = None
        self.language_model.requires_grad_(False)


def load_shared(model: Mapping[str, Any], *, cache_folder: Path | None, limits: Limits, seed: int) -> Shared:
    """`model`: as for `load_parts`."""
    parts = load_parts(**model, seed=seed)
    return Shared(parts, Features(parts.encoders, cache_folder, limits), load_llm(parts, model["llm"]))


@dataclass(frozen=True)
class StageRows:
    """The rows that a stage sees: `weights`, times an epoch; `lengths` in tokens; `longest`, the tokens that a packed
    row must hold for each: with a teacher, as many as the longer of the two has; `groups`: numbers of the rows that
    stay in one packed row.
    """

    samples: Dataset
    weights: list[float]
    lengths: list[int]
    longest: list[int]
    groups: list[list[int]]


def stage_rows(
    folder: RunFolder,
    training: Sequence[Entry],
    samples: Dataset,
    stage: Mapping[str, Any],
    model: MultimodalModel,
    parts: Parts,
    features: Features,
    limit: int,
    mixing_temperature: float,
) -> StageRows:
    chosen = [i for i, entry in enumerate(training) if not stage["sources"] or entry.source in stage["sources"]]
    weights = mixed([training[i] for i in chosen], mixing_temperature)
    if not stage["distill"]:
        seen = samples.select(chosen)
        lengths = [len(ids) for ids in seen["input_ids"]]
        together: dict[Any, list[int]] = {}
        for number, (head, group) in enumerate(zip(seen["head"], seen["group"], strict=True)):
            key = (training[chosen[number]].source, group) if head and group else number
            together.setdefault(key, []).append(number)
        return StageRows(seen, weights, lengths, lengths, list(together.values()))
    seen = distilled(folder, [training[i].sample for i in chosen], stage, model, parts, features, limit)
    lengths = [len(ids) for ids in seen["input_ids"]]
    taught = [len(ids) for ids in seen["teacher_input_ids"]]
    longest = [max(pair) for pair in zip(lengths, taught, strict=True)]
    return StageRows(seen, weights, lengths, longest, [[number] for number in range(len(lengths))])


def distilled(
    folder: RunFolder,
    samples: Sequence[Sample],
    stage: Mapping[str, Any],
    model: MultimodalModel,
    parts: Parts,
    features: Features,
    limit: int,
) -> Dataset:
    """Training rows with the answers to imitate, and beside them the same with each medium's text in its place.

    The LLM's own answers are written down once per run. Raises DataError where a medium has no text.
    """
    wrong = [
        f"{sample.where}: {medium.path.name} has no caption or transcript"
        for sample in samples
        for medium in sample.media
        if medium.text is None
    ]
    if wrong:
        told = f"stage {stage['name']!r} distills: the task's `transcript` names the column of what media show or say"
        raise DataError(listed(wrong, told))
    if stage["distill"]["answers"] == "own":
        path = folder.data / f"answers-{stage['name']}.json"
        if PartialState().is_main_process and not path.is_file():
            write_json(path, {"answers": own_answers(samples, model, parts, stage["distill"]["max_new_tokens"])})
        PartialState().wait_for_everyone()
        answers = read_json(path)["answers"]
        # An empty answer is the end of the turn at once: nothing to imitate but that, so the row's own is taken.
        samples = [sample.answered(answer or sample.answer) for sample, answer in zip(samples, answers, strict=True)]
    seen = tokenized(samples, parts, features, limit)
    read = tokenized([sample.in_words() for sample in samples], parts, features, limit)
    return seen.add_column("teacher_input_ids", read["input_ids"][:]).add_column("teacher_labels", read["labels"][:])


def own_answers(samples: Sequence[Sample], model: MultimodalModel, parts: Parts, max_new_tokens: int) -> list[str]:
    """What the LLM as it came answers to each row whose media are put into words."""
    assistant = Assistant(model.eval(), parts.tokenizer, parts.placeholders, {})
    answers: list[str] = []
    with without_adapter(model.language_model), bar("answers to imitate", len(samples)) as step:
        for start in range(0, len(samples), 16):
            chunk = [sample.in_words().question for sample in samples[start : start + 16]]
            answers += assistant.answers(chunk, max_new_tokens=max_new_tokens)
            for _ in chunk:
                step()
    return answers
