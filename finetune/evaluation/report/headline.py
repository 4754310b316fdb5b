"""The result of a run, task by task: its main metric with its confidence interval under every condition, and the
questions that this answers.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from finetune.data.predictions import Prediction
from finetune.evaluation.report.content import Content
from finetune.evaluation.report.words import NOUNS, lower_is_better, meaning, number, plain, readable, shorten

Verdict = Literal["yes", "no", "unclear"]


@dataclass(frozen=True)
class Score:
    """`low` and `high`: the 95% confidence interval, None if it isn't known."""

    condition: str
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def meaning(self) -> str:
        return meaning(self.condition)


@dataclass(frozen=True)
class Conclusion:
    question: str
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Headline:
    """`scores`: the tuned one first; `scale`: the value that fills a bar."""

    task: str
    metric: str
    lead: str
    scores: list[Score]
    conclusions: list[Conclusion]
    scale: float


def headlines(content: Content) -> list[Headline]:
    return [
        headline(content, task, metrics)
        for task, metrics in content.metrics.scores.items()
        if any(values.get("tuned") is not None for values in metrics.values())
    ]


def headline(content: Content, task: str, metrics: Mapping[str, Mapping[str, float | None]]) -> Headline:
    metric = content.primary(task, [name for name, values in metrics.items() if values.get("tuned") is not None])
    intervals = content.metrics.intervals.get(task, {}).get(metric, {})
    scores = {
        condition: Score(condition, value, *intervals.get(condition, ()))
        for condition, value in metrics[metric].items()
        if value is not None
    }
    predictions = content.predictions_of(task)
    kinds = sorted({medium.kind for prediction in predictions for medium in prediction.media})
    highest = max(abs(score.high or score.value) for score in scores.values())
    return Headline(
        task=task,
        metric=metric,
        lead=_lead(metric, scores["tuned"], len(predictions)),
        scores=list(scores.values()),
        conclusions=[
            *_against_baselines(metric, scores, kinds),
            *_against_most_frequent(metric, scores["tuned"], predictions),
        ],
        scale=(highest if lower_is_better(metric) else max(highest, 1.0)) or 1.0,
    )


def compare(ours: Score, theirs: Score, lower: bool) -> Verdict:
    """ "yes" if ours is better and the intervals don't overlap, "no" if it isn't better, else "unclear". `lower`:
    whether lower is better.
    """
    if (ours.value >= theirs.value) if lower else (ours.value <= theirs.value):
        return "no"
    ours_at_worst = ours.high if lower else ours.low
    theirs_at_best = theirs.low if lower else theirs.high
    ours_at_worst = ours.value if ours_at_worst is None else ours_at_worst
    theirs_at_best = theirs.value if theirs_at_best is None else theirs_at_best
    return "yes" if (ours_at_worst < theirs_at_best if lower else ours_at_worst > theirs_at_best) else "unclear"


def _lead(metric: str, tuned: Score, rows: int) -> str:
    interval = f"95% CI {number(tuned.low)} to {number(tuned.high)}" if tuned.low is not None else "no interval known"
    lower = "; lower is better" if lower_is_better(metric) else ""
    on = f" on {rows:,} held-out rows" if rows else ""
    return f"{plain(metric).capitalize()} {number(tuned.value)} ({interval}){on}{lower}."


def _against_baselines(metric: str, scores: Mapping[str, Score], kinds: Sequence[str]) -> list[Conclusion]:
    tuned, lower, words = scores["tuned"], lower_is_better(metric), plain(metric)
    conclusions = []
    if base := scores.get("base"):
        reason = f"{words} {number(base.value)} before, {number(tuned.value)} after."
        conclusions.append(Conclusion("Did training help?", compare(tuned, base, lower), reason))
    if kinds:
        noun = NOUNS.get(kinds[0], ("", "media"))[1] if len(kinds) == 1 else "media"
        without = {"blank": f"with blank {noun}", "shuffled": f"with other rows' {noun}"}
        conclusions += _dependence(f"Does the answer depend on the {noun}?", metric, scores, without)
        for kind in kinds if len(kinds) > 1 else ():
            noun = NOUNS.get(kind, (kind, kind))[1]
            without = {f"blank_{kind}": f"with blank {noun}"}
            conclusions += _dependence(f"Does the answer depend on the {noun}?", metric, scores, without)
    if probe := scores.get("probe"):
        reason = f"logistic regression on the encoder's features reaches {number(probe.value)}."
        verdict = compare(tuned, probe, lower)
        conclusions.append(Conclusion("Is it better than a linear probe of the media?", verdict, reason))
    return conclusions


def _dependence(
    question: str, metric: str, scores: Mapping[str, Score], without: Mapping[str, str]
) -> list[Conclusion]:
    """Whether the score is clearly worse under each condition (key of `without`) that takes the media away."""
    tuned, lower = scores["tuned"], lower_is_better(metric)
    known = {condition: words for condition, words in without.items() if condition in scores}
    if not known:
        return []
    verdicts = {compare(tuned, scores[condition], lower) for condition in known}
    verdict = verdicts.pop() if len(verdicts) == 1 else "unclear"
    values = " and ".join(f"{number(scores[condition].value)} {words}" for condition, words in known.items())
    if verdict == "yes":
        change = f"{plain(metric)} {'rises' if lower else 'falls'} from {number(tuned.value)} to"
    else:
        change = f"{plain(metric)} is {number(tuned.value)}, and"
    return [Conclusion(question, verdict, f"{change} {values}.")]


def _against_most_frequent(metric: str, tuned: Score, predictions: Sequence[Prediction]) -> list[Conclusion]:
    """For the accuracy of single labels: against always giving the most frequent target."""
    targets = Counter(readable(prediction.target) for prediction in predictions)
    if metric != "accuracy" or not targets or any(isinstance(prediction.target, list) for prediction in predictions):
        return []
    target, count = targets.most_common(1)[0]
    share = Score("most frequent", count / len(predictions))
    reason = f"always answering “{shorten(target, 40)}” reaches {number(share.value)}."
    question = "Is it better than always giving the most frequent answer?"
    return [Conclusion(question, compare(tuned, share, lower=False), reason)]
