"""The result of a run, task by task: a sentence, the main metric under every condition, and what follows from comparing
the trained model with the other conditions on the same rows.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.data.metrics import lower_is_better
from finetune.data.predictions import Prediction
from finetune.evaluation.report import words
from finetune.evaluation.report.content import Content
from finetune.evaluation.report.tables import Score, scores_of
from finetune.evaluation.results import Comparison
from finetune.evaluation.uncertainty import FEWEST, mcnemar

Verdict = Literal["yes", "no", "worse", "unclear"]
CHANCE = 0.05  # p of a difference that is taken for chance
RIGHT = ("accuracy", "exact_match")  # shares of right rows


@dataclass(frozen=True)
class Conclusion:
    """`reasons`: (the two scores, the figures of their difference) of each comparison."""

    question: str
    verdict: Verdict
    reasons: list[tuple[str, str]]


@dataclass(frozen=True)
class Headline:
    """`scores`: the tuned one first; `scale`: the value that fills a bar; `rows`: number of rows scored."""

    task: str
    metric: str
    rows: int
    sentence: str
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
    scores = scores_of(content, task, metric)
    predictions = content.predictions_of(task)
    kinds = sorted({medium.kind for prediction in predictions for medium in prediction.media})
    highest = max(abs(score.high or score.value) for score in scores.values())
    single = not any(isinstance(prediction.target, list) for prediction in predictions)
    rows = content.rows_of(task)
    says = _sentence(metric, scores, rows, kinds, of_rows=metric in RIGHT and single)
    return Headline(
        task=task,
        metric=metric,
        rows=rows,
        sentence=f"On {_rows(content, rows)} {says}",
        scores=list(scores.values()),
        conclusions=[
            *_against_conditions(metric, scores, kinds),
            *(_against_most_frequent(scores["tuned"], predictions) if metric == "accuracy" and single else []),
        ],
        scale=(highest if lower_is_better(metric) else max(highest, 1.0)) or 1.0,
    )


def verdict_of(comparison: Comparison, lower: bool) -> Verdict:
    """ "yes" or "worse" if the CI of the difference excludes 0, or without one if p is small and the rows changed
    accordingly; else "unclear" if the trained model is better, "no" if it isn't. `lower`: whether lower is better.
    """
    sign = -1 if lower else 1
    if comparison.low is not None and comparison.high is not None:
        worst, best = sorted((sign * comparison.low, sign * comparison.high))
        if worst > 0 or best < 0:
            return "yes" if worst > 0 else "worse"
    elif comparison.p is not None and comparison.p < CHANCE:
        changed = comparison.gained - comparison.lost
        if sign * comparison.difference * changed > 0:
            return "yes" if changed > 0 else "worse"
    return "unclear" if sign * comparison.difference > 0 else "no"


def _rows(content: Content, rows: int) -> str:
    plural = "" if rows == 1 else "s"
    path = content.metrics.data.path
    return f"{rows:,} row{plural} of {Path(path).name}" if path else f"{rows:,} held-out row{plural}"


def _sentence(metric: str, scores: Mapping[str, Score], rows: int, kinds: Sequence[str], *, of_rows: bool) -> str:
    """What someone reads who reads nothing else, after the number of rows."""
    tuned, lower = scores["tuned"], lower_is_better(metric)
    if tuned.low is not None and tuned.high is not None:
        certainty = f"95% CI {words.span(metric, tuned.low, tuned.high)}"
    else:
        groups = next((score.compared.groups for score in scores.values() if score.compared), 0)
        counted, noun = (groups, "groups") if groups else (rows, "rows")
        certainty = f"too few {noun} for a CI" if counted < FEWEST else f"all {noun} score alike: no CI"
    certainty += "; lower is better" if lower else ""
    ours = words.value(metric, tuned.value)
    if of_rows:
        says = f"the trained model answers {ours} right ({certainty})"
    else:
        says = f"the trained model's {words.plain(metric)} is {ours} ({certainty})"
    if base := scores.get("base"):
        its = "the untrained one" if of_rows else "the untrained one's is"
        says += f"; {its} {words.value(metric, base.value)}"
        if base.compared:
            says += {
                "yes": "",
                "unclear": ", a difference that may be chance",
                "no": ", so nothing shows that training helped",
                "worse": ", so training made it worse",
            }[verdict_of(base.compared, lower)]
    sentences = [f"{says}."]
    if (blank := scores.get("blank")) and blank.compared:
        noun, value = _noun(kinds), words.value(metric, blank.value)
        sentences.append(
            {
                "yes": f"With blank {noun} it {'rises' if lower else 'falls'} to {value}, so it does use them.",
                "unclear": f"With blank {noun} it is {value}: whether it uses them isn't certain.",
                "no": f"With blank {noun} it is {value}: nothing shows that it uses them.",
                "worse": f"With blank {noun} it is {value}, which is better: the {noun} mislead it.",
            }[verdict_of(blank.compared, lower)]
        )
    return " ".join(sentences)


def _noun(kinds: Sequence[str]) -> str:
    return words.NOUNS.get(kinds[0], ("", "media"))[1] if len(kinds) == 1 else "media"


def _against_conditions(metric: str, scores: Mapping[str, Score], kinds: Sequence[str]) -> list[Conclusion]:
    noun = _noun(kinds)
    several = [(kind, words.NOUNS.get(kind, (kind, kind))[1]) for kind in kinds if len(kinds) > 1]
    questions = {
        "Did training help?": {"base": "before training"},
        f"Does it use the {noun}?": {"blank": f"with blank {noun}", "shuffled": f"with other rows' {noun}"},
        **{f"Does it use the {name}?": {f"blank_{kind}": f"with blank {name}"} for kind, name in several},
        "Is it better than a linear probe of the media?": {"probe": "with logistic regression on the features"},
    }
    conclusions = []
    for question, others in questions.items():
        known = [(name, score.value, score.compared) for key, name in others.items() if (score := scores.get(key))]
        compared = [(name, value, difference) for name, value, difference in known if difference]
        if verdicts := {verdict_of(difference, lower_is_better(metric)) for _, _, difference in compared}:
            ours = words.value(metric, scores["tuned"].value)
            reasons = [
                (f"{ours} against {words.value(metric, value)} {name}", figures(metric, difference))
                for name, value, difference in compared
            ]
            verdict = verdicts.pop() if len(verdicts) == 1 else "unclear"
            conclusions.append(Conclusion(question, verdict, reasons))
    return conclusions


def _against_most_frequent(tuned: Score, predictions: Sequence[Prediction]) -> list[Conclusion]:
    """Single labels, against always giving the most frequent target."""
    targets = [words.readable(prediction.target) for prediction in predictions]
    if not targets or any(prediction.good is None for prediction in predictions):
        return []
    target, count = Counter(targets).most_common(1)[0]
    right = [(prediction.good == 1, other == target) for prediction, other in zip(predictions, targets, strict=True)]
    compared = mcnemar(right.count((True, False)), right.count((False, True)), len(right))
    ours, theirs = (words.value("accuracy", value) for value in (tuned.value, count / len(predictions)))
    question = "Is it better than always giving the most frequent answer?"
    reason = f"{ours} against {theirs} with “{words.shorten(target, 40)}”"
    verdict = verdict_of(compared, lower=False)
    return [Conclusion(question, verdict, [(reason, figures("accuracy", compared))])]


def figures(metric: str, compared: Comparison) -> str:
    """'+50.9 points, 95% CI +42.6 to +58.0; rows: 120 gained, 5 lost; p < 0.001'."""
    noun = "groups" if compared.groups else "rows"
    scale, form, unit = (100, "+.1f", " points") if words.is_share(metric) else (1, "+.3f", "")
    text = f"{scale * compared.difference:{form}}{unit}, "
    if compared.low is not None and compared.high is not None:
        text += f"95% CI {scale * compared.low:{form}} to {scale * compared.high:{form}}"
    else:
        text += f"too few {noun} for a CI"
    text = text.replace("-", "−") + f"; {noun}: {compared.gained:,} gained, {compared.lost:,} lost"
    if compared.p is not None:
        text += "; p < 0.001" if compared.p < 0.001 else f"; p = {compared.p:.2g}"
    return text
