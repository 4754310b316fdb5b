"""Evaluate: answers on held-out rows, scored by their tasks; the same rows untrained, with blank and with shuffled
media, and a linear probe on the same features beside them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from finetune.common.energy import EnergyMeter
from finetune.common.errors import DataError
from finetune.common.memory import ANSWERING, enough_memory
from finetune.common.progress import bar, fresh_memory, peak_memory_bytes, quiet_libraries
from finetune.common.run_folder import RunFolder, RunLike, refuse_several_processes
from finetune.data.hold_out import sample_key
from finetune.data.new_files import RowsAs
from finetune.data.predictions import Prediction, write_predictions
from finetune.data.rows import by_task, of_task, read_splits, subset
from finetune.data.run_rows import splits_of_run
from finetune.data.sample import Answer, Sample
from finetune.evaluation import plots
from finetune.evaluation.conditions import Condition, conditions
from finetune.evaluation.evaluation_result import EvaluationResult
from finetune.evaluation.new_rows import NewRows, refuse_without_rows
from finetune.evaluation.probe import probe
from finetune.evaluation.results import Comparison
from finetune.evaluation.scores import (
    AnswerLoss,
    Measures,
    answer_batches,
    answer_losses,
    answers_to,
    known_bindings,
    measured,
)
from finetune.evaluation.uncertainty import ScoredRows, compare
from finetune.model.adapter import load_trained
from finetune.model.assistant import Assistant
from finetune.model.bindings import TaskBinding
from finetune.model.run import Run
from finetune.recipe.load import Recipe, load_recipe
from finetune.recipe.parts import TaskPart

Table = dict[str, dict[str, float | None]]  # {metric: {condition: value}}


@dataclass
class Evaluation:
    """`scores`, `intervals` (95%), `comparisons` and `tables` by task binding, as in metrics.json; one prediction
    per row.
    """

    scores: dict[str, Table] = field(default_factory=dict)
    intervals: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    comparisons: dict[str, dict[str, dict[str, Comparison]]] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    predictions: list[Prediction] = field(default_factory=list)


@enough_memory("evaluating", ANSWERING)
def evaluate(
    run: RunLike,
    data: Path | str | None = None,
    *,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    media_folder: Path | None = None,
    encoding: str | None = None,
    out: Path | str | None = None,
) -> EvaluationResult:
    """Score a trained run on the rows its recipe names; writes metrics.json, predictions.jsonl and plots/scores.png.

    `data`: score these rows instead, a file or folder with answers; what is written goes to `out`, by default
    RUN/evaluations/NAME of the file, and the run's own scores stay. `task`: which of several tasks they are for.
    `columns`: the task's column -> the file's, by default as in the recipe; `media_folder`: by default the rows' own;
    `encoding`: of a table, by default the recipe's where it has it, else detected.
    Raises RecipeError; ArtifactError where `run` isn't a trained run, DataError where there are no rows to score.
    """
    quiet_libraries()
    refuse_several_processes("`finetune evaluate`")
    fresh_memory()
    if data is None:
        refuse_without_rows(task, columns, media_folder, encoding, out)
    folder = RunFolder.open(run, needs="adapter")
    recipe = load_recipe(folder.recipe)
    new = None if data is None else NewRows.of(recipe, Path(data), task, RowsAs(columns, media_folder, encoding))
    written = RunFolder(new.folder(folder, out)) if new else folder
    begin = perf_counter()
    with EnergyMeter() as meter:
        evaluation, trained_on = _evaluated(folder, recipe, new)
    if new:
        written.metrics.unlink(missing_ok=True)  # perhaps of another task
        written.update_metrics(data={"path": str(new.source.path), "trained_on": trained_on})
    written.update_metrics(
        scores=evaluation.scores,
        intervals=evaluation.intervals,
        comparisons={
            task: {m: {c: asdict(one) for c, one in conditions.items()} for m, conditions in metrics.items()}
            for task, metrics in evaluation.comparisons.items()
        },
        scored_rows=Counter(prediction.task for prediction in evaluation.predictions),
        tables=evaluation.tables,
        seconds={"evaluate": perf_counter() - begin},
        energy_joules={f"evaluate_{device}": joules for device, joules in meter.joules.items()},
        peak_memory_bytes={f"evaluate_{device}": value for device, value in peak_memory_bytes().items()},
    )
    write_predictions(written.predictions, evaluation.predictions)
    plots.scores(evaluation.scores, written.plots / "scores.png")
    return EvaluationResult.of(folder, written)


def _evaluated(folder: RunFolder, recipe: Recipe, new: NewRows | None) -> tuple[Evaluation, int]:
    """(the evaluation, how many of its rows are also training rows)."""
    max_bytes = recipe.media.max_bytes
    splits = read_splits(recipe.data, recipe.seed, max_bytes, recipe.file) if new else splits_of_run(folder, recipe)
    held_out = splits.of(recipe.evaluate.split)
    samples = new.samples(recipe.media) if new else subset(held_out, recipe.evaluate.limit, recipe.seed)
    if not samples:
        raise DataError(f"no rows in split {recipe.evaluate.split!r} to evaluate on")
    learned = {*splits.train.column("key").to_pylist()} if new else set()
    trained_on = sum(sample_key(sample) in learned for sample in samples if new)
    run = Run.load(folder, recipe, known_bindings(folder.adapter, samples, recipe.data))
    model = run.build(with_encoders=bool(run.components.tuned))
    for kind, media in run.features.missing([medium for sample in samples for medium in sample.media]).items():
        if media:
            with bar(f"encode {kind}", len(media)) as step:
                run.features.fill(media, step)
    answers = Answers(run, run.assistant(model), samples)
    with bar("answers", len(samples) * answers.rounds) as answers.step:
        answers.ask_untrained()
        load_trained(model, folder.adapter)
        answers.ask_trained()
    return score_answers(answers, splits.train), trained_on


class Answers:
    """The answers to some samples under each condition: {condition: an answer per sample} in `given`; in `losses`
    {condition: {number: how likely the right answer is}} of samples of text alone, answered in words.
    """

    def __init__(self, run: Run, assistant: Assistant, samples: Sequence[Sample]) -> None:
        self.run, self.assistant, self.samples = run, assistant, samples
        self.conditions = conditions(run.features, samples, run.recipe.seed)
        self.step: Any = lambda: None
        self.halving = answer_batches()
        self.given: dict[str, list[Answer]] = {}
        self.losses: dict[str, dict[int, AnswerLoss]] = {}

    @property
    def rounds(self) -> int:
        return 1 + len(self.conditions)

    def ask_untrained(self) -> None:
        """The model as composed: new parts, and an adapter that changes nothing yet."""
        self._ask(Condition("base", self.run.features), copy=False)
        self._measure_losses("base")

    def ask_trained(self) -> None:
        self._measure_losses("tuned")
        for condition in self.conditions:
            self._ask(condition)
        order = ("tuned", "base", *(condition.name for condition in self.conditions[1:]))
        self.given = {name: self.given[name] for name in order}

    def _ask(self, condition: Condition, copy: bool = True) -> None:
        answers: dict[int, Answer] = {}
        for i, sample in enumerate(self.samples):
            if copy and (other := condition.same_as(sample)):
                answers[i] = self.given[other][i]
                self.step()
        left = [i for i in range(len(self.samples)) if i not in answers]
        asked = [self.samples[i] for i in left]
        new = answers_to(self.assistant, asked, self.run.recipe.evaluate, condition.view, self.step, self.halving)
        answers |= dict(zip(left, new, strict=True))
        self.given[condition.name] = [answers[i] for i in range(len(self.samples))]

    def _measure_losses(self, condition: str) -> None:
        numbers = [
            i
            for i, sample in enumerate(self.samples)
            if not sample.media and not self.run.bindings[sample.task].trained
        ]
        losses = answer_losses(self.assistant, [self.samples[i] for i in numbers])
        self.losses[condition] = dict(zip(numbers, losses, strict=True))


def score_answers(answers: Answers, training: Sequence[Sample]) -> Evaluation:
    """`training`: for the probe."""
    result = Evaluation()
    run, samples = answers.run, answers.samples
    predictions: dict[int, Prediction] = {}
    for name, numbers in by_task(samples).items():
        binding, own = run.bindings[name], [samples[i] for i in numbers]
        by_condition = {condition: [given[i] for i in numbers] for condition, given in answers.given.items()}
        if not any(sample.media for sample in own):  # nothing to blank or to shuffle
            by_condition = {condition: by_condition[condition] for condition in ("tuned", "base")}
        elif labels := probe(of_task(training, name), own, run.features.features):
            by_condition["probe"] = [Answer(label) for label in labels]
        scores = TaskScores(binding, run.recipe.seed)
        rows = [Prediction.of(sample, binding.target(sample)) for sample in own]
        for condition, given in by_condition.items():
            read, measures = measured(binding, own, given)
            losses = answers.losses.get(condition, {})
            scores.add(condition, measures, [losses.get(i) for i in numbers])
            if condition != "probe":
                for row, prediction in zip(rows, read, strict=True):
                    row.answers[condition] = prediction
            if condition == "tuned":
                rows = [replace(row, good=round(float(m["good"]), 4)) for row, m in zip(rows, measures, strict=True)]
        shown = [*answers.given, "probe"] if "shuffled" in by_condition else ["tuned", "base"]
        result.scores[name] = {m: {c: values.get(c) for c in shown} for m, values in scores.values.items()}
        result.intervals[name], result.comparisons[name] = scores.intervals, scores.comparisons
        if scores.tables is not None:
            result.tables[name] = scores.tables
        predictions |= dict(zip(numbers, rows, strict=True))
    result.predictions = [predictions[i] for i in range(len(samples))]
    return result


class TaskScores:
    """The scores of one task binding, condition by condition: first the tuned one, with which others are compared."""

    def __init__(self, binding: TaskBinding, seed: int) -> None:
        self.task: TaskPart = binding.task
        self.seed = seed
        self.values: Table = {}
        self.intervals: dict[str, dict[str, list[float]]] = {}
        self.comparisons: dict[str, dict[str, Comparison]] = {}
        self.tables: dict[str, Any] | None = None
        self._tuned: ScoredRows | None = None

    def add(self, condition: str, measures: Measures, losses: Sequence[AnswerLoss | None]) -> None:
        for measure, loss in zip(measures, losses, strict=True):
            if loss is not None:
                measure |= {"nats": loss.nats, "tokens": loss.tokens}
        scored = ScoredRows(measures, self._score, self.seed)
        for metric, value in scored.values.items():
            self.values.setdefault(metric, {})[condition] = round(value, 4)
            if ends := scored.interval(metric):
                self.intervals.setdefault(metric, {})[condition] = [round(end, 4) for end in ends]
            if self._tuned and metric in self._tuned.values:
                compared = self.comparisons.setdefault(metric, {})
                compared[condition] = compare(self._tuned, scored, metric)
        if condition == "tuned":
            self._tuned = scored
            self.tables = self.task.tables(measures)

    def _score(self, measures: Measures) -> dict[str, float]:
        """The task's metrics, and the loss per token of right answers where it is known."""
        scores = self.task.score(measures)
        if measures and all("nats" in measure for measure in measures):
            scores["error_nats_per_token"] = sum(m["nats"] for m in measures) / sum(m["tokens"] for m in measures)
        return scores
