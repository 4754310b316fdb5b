"""Training rows as token ids, with a teacher's beside them where a stage distills, or all answers that are compared."""

from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState

from finetune.common.errors import DataError
from finetune.common.kept_tables import keep, taken
from finetune.common.progress import bar
from finetune.common.run_folder import read_json, write_json
from finetune.data.rows import answers_of, error_list
from finetune.data.sample import Medium, Message, Sample
from finetune.model.assistant import Assistant
from finetune.model.composite import MultimodalModel
from finetune.model.features import MediaView
from finetune.model.language_model import without_adapter
from finetune.model.prefixes import IGNORED, Beginning, most_shared
from finetune.model.run import Run
from finetune.model.tokenize import Tokens
from finetune.recipe.parts import Needs, ObjectivePart
from finetune.recipe.schema import Stage
from finetune.training.row_limit import answers_by_role, too_long

DISTILL_BATCH = 16  # questions answered at once
COUNTED = ("chosen", "desirable", "undesirable")  # roles: of each pair, and of each labelled answer, one


@dataclass(frozen=True)
class TokenizedSample:
    """A training row, as an Arrow table holds it. `labels`: -100 where nothing is learned; `media_*`: its media in the
    order of their placeholders, and where in `input_ids` each begins and ends. With a head that has weights,
    `input_ids` are the question alone, `head` names the head, `target` is what it learns, and samples of an equal
    `group` are compared. With a teacher, `teacher_*` are the same row with each medium's text in its place. `role`, of
    an answer that is compared with others of its `group`: "chosen" or "rejected"; "desirable" or "undesirable"; "other"
    for another row's answer; "sampled" for one of the model's own.
    `positions` (3, T): of bases whose positions have three dimensions, where the row has media.
    """

    input_ids: list[int]
    labels: list[int]
    where: str
    media_kinds: list[str]
    media_paths: list[str]
    media_keys: list[str]
    media_begins: list[int]
    media_ends: list[int]
    head: str = ""
    target: list[float] | None = None
    group: str = ""
    loss_weight: float = 1.0
    teacher_input_ids: list[int] | None = None
    teacher_labels: list[int] | None = None
    role: str = ""
    positions: list[list[int]] | None = None

    @property
    def learned(self) -> int:
        """How many tokens are learned."""
        return sum(label != IGNORED for label in self.labels[1:])

    @classmethod
    def of(cls, tokens: Tokens, where: str) -> "TokenizedSample":
        """A conversation that the LLM's own head learns."""
        return cls(
            input_ids=tokens.input_ids,
            labels=tokens.labels,
            where=where,
            media_kinds=[medium.kind for medium in tokens.media],
            media_paths=[str(medium.path) for medium in tokens.media],
            media_keys=[medium.key for medium in tokens.media],
            media_begins=list(tokens.media_begins),
            media_ends=list(tokens.media_ends),
            positions=tokens.positions,
        )

    @property
    def media(self) -> list[Medium]:
        columns = zip(self.media_kinds, self.media_paths, self.media_keys, strict=True)
        return [Medium(kind, Path(path), where=self.where, known_key=key) for kind, path, key in columns]

    @property
    def beginning(self) -> Beginning:
        media = list(zip(self.media_kinds, self.media_keys, strict=True))
        return Beginning(self.input_ids, most_shared(self.labels), media, self.media_begins, self.media_ends)


SCHEMA = pa.schema(
    {
        "input_ids": pa.large_list(pa.int32()),  # large: all of them together may have more than 2^31 tokens
        "labels": pa.large_list(pa.int32()),
        "where": pa.string(),
        "media_kinds": pa.list_(pa.string()),
        "media_paths": pa.list_(pa.string()),
        "media_keys": pa.list_(pa.string()),
        "media_begins": pa.list_(pa.int32()),
        "media_ends": pa.list_(pa.int32()),
        "head": pa.string(),
        "target": pa.list_(pa.float64()),
        "group": pa.string(),
        "loss_weight": pa.float64(),
        "teacher_input_ids": pa.large_list(pa.int32()),
        "teacher_labels": pa.large_list(pa.int32()),
        "role": pa.string(),
        "positions": pa.list_(pa.large_list(pa.int32())),
    }
)


class TokenizedSamples:
    """Training rows in an Arrow table of `SCHEMA`, read one at a time. `numbers`: which of its rows; None: all."""

    def __init__(self, table: pa.Table, numbers: npt.NDArray[np.integer[Any]] | None = None) -> None:
        self.table = table
        self._numbers = numbers

    @property
    def numbers(self) -> npt.NDArray[np.integer[Any]]:
        return np.arange(self.table.num_rows, dtype=np.int32) if self._numbers is None else self._numbers

    @classmethod
    def of(cls, samples: Iterable[TokenizedSample]) -> "TokenizedSamples":
        return cls(keep(None, SCHEMA, map(vars, samples)))

    def __len__(self) -> int:
        return self.table.num_rows if self._numbers is None else len(self._numbers)

    def __getitem__(self, number: int) -> TokenizedSample:
        place = number if self._numbers is None else int(self._numbers[number])
        return TokenizedSample(**{name: self.table.column(name)[place].as_py() for name in SCHEMA.names})

    def arrow(self, name: str) -> pa.ChunkedArray:
        """A column, a value for each sample."""
        return taken(self.table.column(name), self.numbers)

    def column(self, name: str) -> list[Any]:
        result: list[Any] = self.arrow(name).to_pylist()
        return result

    @cached_property
    def head_outputs(self) -> dict[str, int]:
        """{name of a head with weights: numbers that it gives}."""
        named = zip(self.column("head"), self.column("target"), strict=True)
        return {name: len(target) for name, target in named if name}

    def select(self, numbers: Sequence[int]) -> "TokenizedSamples":
        chosen = np.asarray(numbers, np.int32)
        whole = len(chosen) == len(self) and np.array_equal(chosen, np.arange(len(self)))
        return self if whole else TokenizedSamples(self.table, self.numbers[chosen])

    @property
    def lengths(self) -> "array[int]":
        """Tokens of each sample."""
        return _array(pc.list_value_length(self.arrow("input_ids")).to_numpy())

    @property
    def learned(self) -> "array[int]":
        """Learned tokens of each sample."""
        column = self.arrow("labels")
        ends = np.cumsum(pc.list_value_length(column).to_numpy())
        learned = pc.list_flatten(column).to_numpy() != IGNORED
        learned[np.append(0, ends[:-1])] = False  # nothing predicts the first
        sums = np.append(0, np.cumsum(learned))[np.append(0, ends)]
        return _array(np.diff(sums))

    @property
    def taught_lengths(self) -> "array[int]":
        """Tokens that a packed row must hold for each sample: with a teacher, as many as the longer of the two has."""
        teachers = pc.list_value_length(self.arrow("teacher_input_ids")).fill_null(0).to_numpy()
        return _array(np.maximum(self.lengths, teachers))


def _array(numbers: npt.NDArray[Any]) -> "array[int]":
    """Whole numbers in 8 bytes each, which Python reads as its own."""
    return array("q", numbers.astype(np.int64).tobytes())


def groups_of(samples: TokenizedSamples) -> list[list[int]] | None:
    """Numbers of the samples that share a packed row: those that are compared, and each other one alone. None where
    none are compared.
    """
    names = samples.arrow("group")
    if not pc.any(pc.not_equal(names, "")).as_py():
        return None
    groups: dict[Hashable, list[int]] = {}
    for number, group in enumerate(names.to_pylist()):
        groups.setdefault(group or number, []).append(number)
    return list(groups.values())


def tokenized(samples: Iterable[Sample], run: Run) -> Iterator[TokenizedSample]:
    """Raises DataError, at the end, with all rows that can't be used."""
    return _each(samples, lambda sample: (_fitting(sample, run),))


Item = TypeVar("Item")


def _each(items: Iterable[Item], rows_of: Callable[[Item], Sequence[TokenizedSample]]) -> Iterator[TokenizedSample]:
    errors: list[str] = []
    count = 0
    for item in items:
        count += 1
        try:
            rows = rows_of(item)
        except DataError as error:
            errors.append(str(error))
            continue
        if not errors:
            yield from rows
    if errors:
        raise DataError(error_list(errors, f"{len(errors)} of {count} training rows can't be used"))


def _fitting(sample: Sample, run: Run) -> TokenizedSample:
    """Raises DataError where a packed row doesn't hold it."""
    row = _tokenized(sample, run)
    _refuse_too_long(sample.where, {"": len(row.input_ids)}, run)
    return row


def _tokenized(sample: Sample, run: Run) -> TokenizedSample:
    binding = run.bindings[sample.task]
    grouped = binding.trained and sample.group
    return replace(
        TokenizedSample.of(run.tokens(sample, whole=not binding.trained), sample.where),
        head=sample.task if binding.trained else "",
        target=binding.encode(sample) if binding.trained else None,
        group=f"{sample.source}/{sample.group}" if grouped else "",  # two files may both have a user 1
        loss_weight=run.recipe.data[sample.source].loss_weight,
    )


def _refuse_too_long(where: str, lengths: Mapping[str, int], run: Run, objective: ObjectivePart | None = None) -> None:
    """Raises DataError where `too_long` says why."""
    if why := too_long(where, lengths, int(run.recipe.train.tokens_per_batch), objective):
        raise DataError(why)


def distilled(samples: Sequence[Sample], stage: Stage, run: Run, model: MultimodalModel) -> Iterator[TokenizedSample]:
    """Training rows with the answers to imitate, and beside them the same with each medium's text in its place.

    The LLM's own answers are generated once per run. Raises DataError where a medium has no text.
    """
    errors = [
        f"{sample.where}: {medium.path.name} has no caption or transcript"
        for sample in samples
        for medium in sample.media
        if medium.text is None
    ]
    if errors:
        headline = f"stage {stage.name!r} distills: the task's `transcript` names the column with the media's text"
        raise DataError(error_list(errors, headline))
    options: Any = stage.objective.options
    if options.answers == "own":
        by_media = samples

        def own_answers() -> list[str]:
            questions = [sample.in_words().question for sample in by_media]
            with without_adapter(model.language_model):
                return [*answers_to_imitate(questions, run.assistant(model), options.max_new_tokens)]

        samples = with_kept_answers(samples, run.folder.data / f"answers-{stage.name}.json", own_answers)
    return _each(samples, lambda sample: (_with_teacher(sample, run),))


def _with_teacher(sample: Sample, run: Run) -> TokenizedSample:
    row, teacher = _fitting(sample, run), run.tokens(sample.in_words())
    _refuse_too_long(sample.where, {"": len(teacher.input_ids)}, run)
    return replace(row, teacher_input_ids=teacher.input_ids, teacher_labels=teacher.labels)


def compared(samples: Sequence[Sample], needs: Needs, run: Run) -> Iterator[TokenizedSample]:
    """Training rows with the answers that an objective compares: of each the chosen and the rejected one ("pairs"), or
    its own with its label, and that of the row before ("unpaired"). Raises DataError, at the end, with all rows that
    can't be used.
    """
    others = [*answers_of(samples)] if needs == "unpaired" else []

    def together(entry: tuple[int, Sample]) -> list[TokenizedSample]:
        number, sample = entry
        answers = answers_by_role(sample, needs, others[number - 1] if others else "")
        rows = [replace(_tokenized(one, run), role=role, group=str(number)) for role, one in answers.items()]
        _refuse_too_long(sample.where, {row.role: len(row.input_ids) for row in rows}, run)
        return rows

    return _each(enumerate(samples), together)


def prompts(samples: Sequence[Sample], objective: ObjectivePart, run: Run) -> Iterator[TokenizedSample]:
    """The prompts of training rows, without their answers. Raises DataError, at the end, with all rows whose sampled
    answers no packed row would hold.
    """

    def prompt_of(sample: Sample) -> list[TokenizedSample]:
        row, prompt = _tokenized(sample, run), run.tokens(sample, whole=False)
        ids = prompt.input_ids
        _refuse_too_long(sample.where, {"": len(ids)}, run, objective)
        return [replace(row, input_ids=ids, labels=[IGNORED] * len(ids), positions=prompt.positions)]

    return _each(samples, prompt_of)


def answers_to_imitate(
    questions: Sequence[Sequence[Message]], assistant: Assistant, max_new_tokens: int, view: MediaView | None = None
) -> Iterator[str]:
    """Greedy answers, one by one. `view`: as in `Assistant.answers`."""
    assistant.model.eval()
    with bar("answers to imitate", len(questions)) as step:
        for start in range(0, len(questions), DISTILL_BATCH):
            chunk = questions[start : start + DISTILL_BATCH]
            for text in assistant.answers(chunk, max_new_tokens=max_new_tokens, view=view):
                yield text
                step()


def with_kept_answers(samples: Sequence[Sample], path: Path, compute: Callable[[], Iterable[str]]) -> list[Sample]:
    """The samples with the answers that the main process computes, which a run that goes on finds in `path`."""
    if PartialState().is_main_process and not path.is_file():
        write_json(path, {"answers": list(compute())})
    PartialState().wait_for_everyone()
    answers = read_json(path)["answers"]
    # An empty answer is the end of the turn at once: nothing to imitate but that, so the row's own is taken.
    return [sample.answered(answer or sample.answer) for sample, answer in zip(samples, answers, strict=True)]
