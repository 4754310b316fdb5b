"""Answers and distributions of another model, the teacher, for a stage's rows. They are computed before the student's
LLM is loaded, so that the two are never in memory together, and kept for other runs in the user's cache.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device

from finetune.common.errors import RUN, DataError, RecipeError, TrainingError, option
from finetune.common.kept_tables import keep, opened
from finetune.common.progress import bar, console, fresh_memory
from finetune.common.run_folder import RunFolder, read_json, write_json
from finetune.common.user_cache import user_cache
from finetune.data.rows import error_list, picked
from finetune.data.sample import Medium, Sample
from finetune.model.assistant import Assistant
from finetune.model.composition import PLACEHOLDERS
from finetune.model.features import Features
from finetune.model.language_model import context_length, default_device, load_tokenizer
from finetune.model.load import load_base, load_folder, model_folder
from finetune.model.prefixes import IGNORED
from finetune.model.row_layout import RowKind, row_kind
from finetune.model.row_plan import by_segments
from finetune.model.run import Run
from finetune.model.teacher_distributions import TeacherDistributions
from finetune.model.tokenize import tokenize
from finetune.model.trained_for import fingerprint, is_own
from finetune.recipe.load import Recipe
from finetune.recipe.schema import Base
from finetune.training.collate import Collator, PackedRow
from finetune.training.pack import plan_rows
from finetune.training.prefixes import sharing_of
from finetune.training.samples import (
    TokenizedSample,
    TokenizedSamples,
    answers_to_imitate,
    tokenized,
    with_kept_answers,
)
from finetune.training.steps import samples_of

ANSWERS = pa.schema({"answer": pa.string()})
OUTPUTS = pa.schema(
    {
        "number": pa.int32(),  # of the sample: rows are in the order in which they were computed
        "tokens": pa.large_list(pa.int32()),
        "ids": pa.large_list(pa.int32()),  # of each token the likeliest, one token after the other
        "log_probs": pa.large_list(pa.float32()),
        "rest": pa.large_list(pa.float32()),
    }
)


class TeacherOutputs:
    """The distributions of the learned tokens of each sample, read one sample at a time."""

    def __init__(self, table: pa.Table, temperature: float) -> None:
        self.table, self.temperature = table, temperature
        self.places = np.argsort(table.column("number").to_numpy())

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> TeacherDistributions:
        row = {name: self._values(name, number) for name in ("ids", "log_probs", "rest")}
        tokens = len(row["rest"])
        ids = torch.tensor(row["ids"], dtype=torch.long).view(tokens, -1)
        return TeacherDistributions(
            ids, torch.tensor(row["log_probs"]).view(tokens, -1), torch.tensor(row["rest"]), self.temperature
        )

    def tokens(self, number: int) -> list[int]:
        """The tokens that they are the distributions of."""
        result: list[int] = self._values("tokens", number).tolist()
        return result

    def _values(self, name: str, number: int) -> Any:
        return self.table.column(name)[int(self.places[number])].values.to_numpy()


@dataclass(frozen=True)
class TeacherData:
    """What a stage learns from a teacher: `samples`, its rows with the answers to learn; `outputs`, the distributions
    at their tokens, None where only the answers are learned.
    """

    teacher: str
    samples: list[Sample]
    outputs: TeacherOutputs | None

    def tokenized(self, run: Run) -> TokenizedSamples:
        """The rows as tokens. Raises DataError where the teacher splits or ends answers otherwise than the student."""
        tokens = TokenizedSamples.of(tokenized(self.samples, run))
        wrong = []
        for number in range(len(tokens) if self.outputs else 0):
            sample = tokens[number]
            learned = [label for label in sample.labels[1:] if label != IGNORED]
            if self.outputs and learned != self.outputs.tokens(number):
                wrong.append(sample.where)
        if wrong:
            headline = (
                f"{self.teacher} writes the answers of {len(wrong):,} of {len(tokens):,} rows in other tokens, as "
                "where its chat template ends them otherwise: write by: answers"
            )
            raise DataError(error_list(wrong, headline))
        return tokens


def run_teachers(recipe: Recipe, training: Sequence[Sample], folder: RunFolder) -> dict[str, TeacherData]:
    """{stage: data of its teacher}, from the cache, or from the teacher, which is loaded for it and released. Raises
    RecipeError for a teacher of another vocabulary, DataError with the rows that it can't read, TrainingError where it
    or its rows have changed since the run began.
    """
    return {
        stage.name: _teacher_data(number, recipe, picked(training, samples_of(stage, training)), folder)
        for number, stage in enumerate(recipe.train.stages)
        if stage.objective.needs == "teacher"
    }


def _teacher_data(number: int, recipe: Recipe, rows: Sequence[Sample], folder: RunFolder) -> TeacherData:
    stage, teacher, samples = recipe.train.stages[number], StageTeacher(number, recipe), list(rows)
    options: Any = stage.objective.options
    outputs = None
    try:
        if PartialState().is_main_process:
            teacher.refuse_changed(folder.data / f"teacher-{stage.name}.json", samples)
            if options.by == "kl":
                teacher.refuse_other_vocabulary()
        if options.answers == "own":

            def answers() -> list[str]:
                content = [options.max_new_tokens]
                table = teacher.kept("answers", content, ANSWERS, rows, teacher.answers, waits=False)
                return [*table.column("answer").to_pylist()]

            samples = with_kept_answers(samples, folder.data / f"answers-{stage.name}.json", answers)
        if options.by == "kl":
            content = [options.temperature, options.top_k]
            table = teacher.kept("distributions", content, OUTPUTS, samples, teacher.distributions)
            outputs = TeacherOutputs(table, options.temperature)
    finally:
        teacher.release()
    return TeacherData(teacher.name, samples, outputs)


class StageTeacher:
    """The teacher of a stage, loaded when first needed."""

    def __init__(self, number: int, recipe: Recipe) -> None:
        self.recipe, self.where = recipe, f"train.stages.{number}.objective"
        options: Any = recipe.train.stages[number].objective.options
        self.options, self.name = options, str(options.teacher)
        self.loaded: Assistant | None = None

    @cached_property
    def folder(self) -> Path:
        return model_folder(self.name, self.options.revision)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.folder)

    @property
    def assistant(self) -> Assistant:
        if self.loaded is None:
            console.print(f"teacher: {self.name}")
            plain = Base(name=str(self.folder), quantize=self.options.quantize)
            self.loaded = load_folder(self.folder) if is_own(self.folder) else load_base(plain)
        return self.loaded

    def release(self) -> None:
        if self.loaded is not None:
            self.loaded = None
            self.__dict__.pop("features", None)  # whose encoders may be in the same model
            fresh_memory()

    @cached_property
    def features(self) -> Features:
        """Of its own encoders."""
        return Features(self.assistant.encoders, self.recipe.train.feature_folder, self.recipe.media)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        return vocabulary_of(load_tokenizer(str(self.folder)))

    def refuse_changed(self, path: Path, samples: Sequence[Sample]) -> None:
        """Note hashes of the teacher and its rows. Raises TrainingError where a resumed run began with others."""
        current = {"teacher": self.name, "fingerprint": self.fingerprint, "rows": rows_digest(samples)}
        before = read_json(path) if path.is_file() else current
        for key, what in (("fingerprint", self.name), ("rows", "the set of its rows")):
            if before[key] != current[key]:
                raise TrainingError(
                    f"{self.where}.teacher: {what} has changed since this run began; begin anew with {option(*RUN)}"
                )
        write_json(path, current)

    def refuse_other_vocabulary(self) -> None:
        """Raises RecipeError."""
        student = self.recipe.model.language_model
        known = load_tokenizer(student.name, revision=student.revision, trust_remote_code=student.trust_remote_code)
        own = vocabulary_of(known)
        theirs = self.vocabulary
        if own != theirs:
            common = len(own.items() & theirs.items())
            raise RecipeError(
                f"{self.where}.by: {self.name} has a vocabulary of {len(theirs):,} tokens, {student.name} one of "
                f"{len(own):,}, and {common:,} are the same: next tokens can't be compared; write by: answers"
            )

    def kept(
        self,
        what: str,
        content: Sequence[object],
        schema: pa.Schema,
        samples: Sequence[Sample],
        compute: Callable[[Sequence[Sample]], Iterator[Mapping[str, object]]],
        *,
        waits: bool = True,
    ) -> pa.Table:
        """The cached table of what `compute` gives, computed by the main process where the cache has none; `waits`:
        all processes call this.
        """
        versions = [version(name) for name in ("torch", "transformers", "peft")]
        limits = self.recipe.media.model_dump(mode="json")
        made_by = [
            what,
            self.fingerprint,
            self.options.quantize,
            *content,
            rows_digest(samples),
            limits,
            versions,
            default_device().type,
        ]
        folder = user_cache("teachers") / hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:32]
        table = opened(folder)
        if table is None and PartialState().is_main_process:
            table = keep(folder, schema, compute(samples), always=True)
        if waits:
            PartialState().wait_for_everyone()
        if table is None and (table := opened(folder)) is None:
            raise TrainingError(f"{folder}: no teacher outputs of the main process: all need one cache")
        return table

    def answers(self, samples: Sequence[Sample]) -> Iterator[Mapping[str, object]]:
        """Its greedy answers, a row each."""
        questions = [sample.question for sample in samples]
        for text in answers_to_imitate(questions, self.assistant, self.options.max_new_tokens, self.features):
            yield {"answer": text}

    @torch.no_grad()
    def distributions(self, samples: Sequence[Sample]) -> Iterator[Mapping[str, object]]:
        """The distribution at each learned token, computed in packed rows as in training."""
        model, tokenizer = self.assistant.model.eval(), self.assistant.tokenizer
        vocabulary = 1 + max(self.vocabulary.values())
        rows = TokenizedSamples.of(self._tokenized(samples))
        lengths = rows.lengths
        kind = RowKind.PADDED if model.composition.base else row_kind(model.causal_lm)
        collator = Collator(
            rows,
            self.features.features,
            field="features",
            kind=kind,
            pad_token_id=tokenizer.pad_token_id,
            prompts_both_ways=model.placement.prompts_both_ways,
        )
        planned = plan_rows(
            lengths,
            [1.0] * len(lengths),
            capacity=max(int(self.recipe.train.tokens_per_batch), *lengths),
            epochs=1,
            seed=0,
            sharing=sharing_of(rows, model.composition.fusion.by_sample) if kind is RowKind.SHARED else None,
        )
        device = model.get_input_embeddings().weight.device
        with bar("the teacher's tokens", len(planned)) as step:
            for row in planned:
                batch: Any = send_to_device(collator([PackedRow(groups=row, filler=False)]), device)
                with by_segments(model.causal_lm) if "row_plan" in batch else nullcontext():
                    logits = model.label_logits(**batch)
                distributions = TeacherDistributions.of(
                    logits, self.options.temperature, self.options.top_k, vocabulary
                )
                numbers = [number for group in row for number in group]
                yield from _as_rows(
                    distributions, batch["shift_labels"][0], numbers, [rows[n].learned for n in numbers]
                )
                step()

    def _tokenized(self, samples: Sequence[Sample]) -> Iterator[TokenizedSample]:
        """Raises DataError with all rows that it can't read."""
        assistant = self.assistant
        segments = assistant.model.placement.segments_by(self.features.layout)
        limit = context_length(assistant.model.causal_lm)
        errors: list[str] = []
        for sample in samples:
            try:
                tokens = tokenize(sample, assistant.tokenizer, assistant.placeholders, segments)
                if limit and len(tokens.input_ids) > limit:
                    raise DataError(f"{sample.where}: {len(tokens.input_ids)} tokens, but {self.name} reads {limit}")
            except DataError as error:
                errors.append(str(error))
                continue
            yield TokenizedSample.of(tokens, sample.where)
        if errors:
            raise DataError(error_list(errors, f"{len(errors)} of {len(samples)} rows can't be read by the teacher"))


def _as_rows(
    distributions: TeacherDistributions, tokens: torch.Tensor, numbers: Sequence[int], sizes: Sequence[int]
) -> Iterator[Mapping[str, object]]:
    begin = 0
    for number, size in zip(numbers, sizes, strict=True):
        own = slice(begin, begin + size)
        yield {
            "number": number,
            "tokens": tokens[own].int().cpu().numpy(),
            "ids": distributions.ids[own].int().cpu().numpy().ravel(),
            "log_probs": distributions.log_probs[own].cpu().numpy().ravel(),
            "rest": distributions.rest[own].cpu().numpy(),
        }
        begin += size


def vocabulary_of(tokenizer: Any) -> dict[str, int]:
    """{token: id}, without the placeholders of media, which no answer has."""
    return {token: number for token, number in tokenizer.get_vocab().items() if token not in PLACEHOLDERS.values()}


def rows_digest(samples: Sequence[Sample]) -> str:
    """SHA-256 of conversations and of their media's content, whatever reads them."""
    digest = hashlib.sha256()
    for sample in samples:
        turns = [
            [turn.role, [[part.kind, part.key] if isinstance(part, Medium) else part for part in turn.content]]
            for turn in sample.messages
        ]
        digest.update(json.dumps(turns).encode())
    return digest.hexdigest()
