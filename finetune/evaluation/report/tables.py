"""The tables of a report and of a card: scores, labels, confusion, calibration, stages, components, sources, cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.data.metrics import lower_is_better
from finetune.data.predictions import Prediction
from finetune.evaluation.report import words
from finetune.evaluation.report.content import Content
from finetune.evaluation.results import Comparison, Confusion, Metrics, StageResult, TaskTables
from finetune.recipe.parts import Part
from finetune.recipe.schema import Stage

MAX_LABELS = 40  # of a confusion matrix
MAX_ROWS = 200  # of any other table
MAX_PAIRS = 20  # of labels confused most
BINS = 10  # of calibration


@dataclass(frozen=True)
class Score:
    """`low` and `high`: the 95% CI, None if it isn't known; `compared`: the trained model's score minus this one."""

    condition: str
    value: float
    low: float | None = None
    high: float | None = None
    compared: Comparison | None = None

    @property
    def interval(self) -> str:
        """'0.561–0.683'; '' where it isn't known."""
        return "" if self.low is None else f"{words.number(self.low)}–{words.number(self.high)}"


def scores_of(content: Content, task: str, metric: str) -> dict[str, Score]:
    """Condition -> score, of those that have one."""
    intervals = content.metrics.intervals.get(task, {}).get(metric, {})
    compared = content.metrics.comparisons.get(task, {}).get(metric, {})
    scores = {}
    for name, value in content.metrics.scores[task][metric].items():
        if value is not None:
            low, high = intervals.get(name, (None, None))
            scores[name] = Score(name, value, low, high, compared.get(name))
    return scores


@dataclass(frozen=True)
class MetricRow:
    metric: str
    primary: bool
    lower_is_better: bool
    cells: list[Score | None]


@dataclass(frozen=True)
class ScoreTable:
    """A task's metrics over so many `rows`; their cells are in the order of `conditions`, None for no score."""

    task: str
    rows: int
    conditions: list[str]
    metrics: list[MetricRow]


def score_tables(content: Content) -> list[ScoreTable]:
    tables = []
    for task, metrics in content.metrics.scores.items():
        scores = {metric: scores_of(content, task, metric) for metric in metrics}
        conditions = list(dict.fromkeys(name for known in scores.values() for name in known))
        primary = content.primary(task, list(metrics)) if metrics else ""
        rows = [
            MetricRow(metric, metric == primary, lower_is_better(metric), [known.get(name) for name in conditions])
            for metric, known in scores.items()
        ]
        tables.append(ScoreTable(task, content.rows_of(task), conditions, rows))
    return tables


@dataclass(frozen=True)
class LabelTable:
    """`rows`: (label, values in the order of `metrics`); `left_out`: number of further labels."""

    metrics: list[str]
    rows: list[tuple[str, list[float | None]]]
    left_out: int


def label_table(tables: TaskTables) -> LabelTable | None:
    if not tables.per_label:
        return None
    metrics = list(dict.fromkeys(name for values in tables.per_label.values() for name in values))
    rows = [(label, [values.get(name) for name in metrics]) for label, values in tables.per_label.items()]
    return LabelTable(metrics, rows[:MAX_ROWS], max(0, len(rows) - MAX_ROWS))


@dataclass(frozen=True)
class ConfusionCell:
    """`share`: of the true label's rows."""

    count: int
    share: float
    correct: bool


@dataclass(frozen=True)
class ConfusionRow:
    label: str
    total: int
    cells: list[ConfusionCell]


@dataclass(frozen=True)
class ConfusionMatrix:
    """Rows are true labels, `columns` predicted ones; no rows if there are too many. `pairs`: (true label, prediction,
    count) of the labels confused most.
    """

    labels: list[str]
    columns: list[str]
    rows: list[ConfusionRow]
    pairs: list[tuple[str, str, int]]


NO_LABEL = "none of them"


def confusion_matrix(confusion: Confusion | None) -> ConfusionMatrix | None:
    if confusion is None or not confusion.labels:
        return None
    labels, counts = confusion.labels, confusion.counts
    columns = [*labels, NO_LABEL][: max(map(len, counts), default=0)]
    if len(columns) > len(labels) and not any(row[-1] for row in counts):
        columns = labels
    rows, pairs = [], []
    for number, (label, row) in enumerate(zip(labels, counts, strict=False)):
        total = sum(row)
        cells = [
            ConfusionCell(count, count / max(total, 1), number == i) for i, count in enumerate(row[: len(columns)])
        ]
        rows.append(ConfusionRow(label, total, cells))
        pairs += [(label, columns[i], cell.count) for i, cell in enumerate(cells) if cell.count and not cell.correct]
    return ConfusionMatrix(
        labels,
        columns,
        rows if len(labels) <= MAX_LABELS else [],
        sorted(pairs, key=lambda pair: -pair[2])[:MAX_PAIRS],
    )


def calibration(predictions: Sequence[Prediction]) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, rows) of each bin of equal width that holds rows; [] without probabilities of single
    labels. Confidence is the probability of the predicted label.
    """
    bins: dict[int, list[tuple[float, bool]]] = {}
    for prediction in predictions:
        sure, target = words.confidence(prediction.tuned), words.label_of(prediction.target)
        if sure is not None and math.isfinite(sure) and isinstance(target, str):
            correct = words.label_of(prediction.tuned) == target
            bins.setdefault(min(int(sure * BINS), BINS - 1), []).append((sure, correct))
    return [
        (sum(sure for sure, _ in rows) / len(rows), sum(correct for _, correct in rows) / len(rows), len(rows))
        for _, rows in sorted(bins.items())
    ]


@dataclass(frozen=True)
class StageRow:
    """A stage of the recipe, and its result if it has been trained. `loss`: mean of the first and the last tenth of the
    steps; `figures`: the same of what else its objective reports.
    """

    stage: Stage
    result: StageResult | None
    loss: tuple[float, float] | None
    figures: dict[str, tuple[float, float]]

    @property
    def weights(self) -> str:
        if self.result is None or not self.result.trained_weights:
            return ", ".join(self.stage.trains)
        return ", ".join(f"{part} ({count:,})" for part, count in self.result.trained_weights.items())

    @property
    def notes(self) -> list[str]:
        """What went otherwise than the recipe says, or seemed wrong."""
        if self.result is None:
            return []
        pieces = f"memory ran out: packed rows were computed in up to {self.result.pieces} pieces; the loss is the same"
        return [*([pieces] if self.result.pieces > 1 else []), *self.result.warnings]


def stages(content: Content) -> list[StageRow]:
    rows = []
    for stage in content.recipe.train.stages if content.recipe else ():
        result = content.metrics.train.stages.get(stage.name)
        figures = {name: _from_to(values) for name, values in (result.figures if result else {}).items()}
        known = {name: both for name, both in figures.items() if both is not None}
        rows.append(StageRow(stage, result, _from_to(result.losses if result else []), known))
    return rows


def _from_to(steps: Sequence[float | None]) -> tuple[float, float] | None:
    """Means of the first and of the last tenth of the steps that have a value."""
    values = [value for value in steps if value is not None]
    tenth = max(1, len(values) // 10)
    return (sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth) if values else None


@dataclass(frozen=True)
class ComponentRow:
    """`name`: of what it was loaded from, or its kind."""

    role: str
    name: str
    options: str
    commit: str = ""


def components(content: Content) -> list[ComponentRow]:
    if (recipe := content.recipe) is None:
        return []
    llm = recipe.model.language_model
    options = words.options(llm.model_dump(mode="json", exclude={"name", "revision"}))
    commit = content.commits.get(recipe.model.language_part) or llm.revision or ""
    existing = recipe.model.base is not None
    rows = [ComponentRow(recipe.model.language_noun, words.short_path(llm.name), options, commit)]
    for medium, encoder in recipe.model.encoders.items():
        settings: dict[str, object] = encoder.options.model_dump(mode="json")
        name, revision = settings.pop("name", ""), settings.pop("revision", None)
        commit = content.commits.get(f"encoders.{medium}") or str(revision or "")
        title = f"{encoder.kind}: {words.short_path(name)}"
        rows.append(ComponentRow(f"encoder of {medium}", title, words.options(settings), commit))
    for medium, projector in recipe.model.projectors.items():
        rows.append(ComponentRow(f"projector of {medium}", projector.kind, _options(projector)))
    if not existing:
        rows.append(ComponentRow("fusion", recipe.model.fusion.kind, _options(recipe.model.fusion)))
    if recipe.adapter:
        on = f"LoRA on the {recipe.model.language_noun}"
        rows.append(ComponentRow("adapter", on, words.options(recipe.adapter.model_dump(mode="json"))))
    for medium, tuning in recipe.tune_encoders.items():
        rows.append(ComponentRow(f"tuning of {medium}", "encoder", words.options(tuning.model_dump(mode="json"))))
    return rows


def _options(part: Part) -> str:
    return words.options(part.options.model_dump(mode="json"))


@dataclass(frozen=True)
class SourceRow:
    path: str
    name: str
    task: str
    prompt: str
    split: str
    options: str


def sources(content: Content) -> list[SourceRow]:
    rows = []
    for name, source in content.sources:
        options = words.options(
            {
                "hold out": source.hold_out,
                "hold out validation": source.hold_out_validation,
                "group": source.group,
                "weight": source.weight if source.weight != 1 else None,
                "head": source.head.kind,
            }
        )
        prompt = words.shorten(str(getattr(source.task.options, "prompt", "")), 200)
        rows.append(SourceRow(words.short_path(source.path), name, source.task.kind, prompt, source.split, options))
    return rows


@dataclass(frozen=True)
class Cost:
    """`rows`: (part of the run, amount); [] if nothing was measured."""

    title: str
    rows: list[tuple[str, str]]


def planned_beside(metrics: Metrics) -> list[tuple[str, str]]:
    """(part of the run, both amounts), of what has been planned and measured."""
    return [
        (f"{kind}, {words.plain(part)}", f"{written(planned[part])} planned, {written(measured[part])} measured")
        for kind, written, planned, measured in (
            ("memory", words.memory, metrics.planned_memory_bytes, metrics.peak_memory_bytes),
            ("time", words.duration, metrics.planned_seconds, metrics.seconds),
        )
        for part in planned
        if part in measured
    ]


def costs(content: Content) -> list[Cost]:
    metrics = content.metrics
    beside = planned_beside(metrics)
    energy = "Energy (training since the last --resume)" if metrics.train.resumed else "Energy"
    return [
        *([Cost("Planned and measured", beside)] if beside else []),
        Cost("Time", [(words.plain(part), words.duration(value)) for part, value in metrics.seconds.items()]),
        Cost("Peak memory", [(words.plain(p), words.memory(value)) for p, value in metrics.peak_memory_bytes.items()]),
        Cost(energy, [(words.plain(part), words.energy(value)) for part, value in metrics.energy_joules.items()]),
    ]
