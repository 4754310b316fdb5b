"""What a run comes to, a task at a time: its primary metric with its interval beside what it is to be compared with,
and the questions that this answers.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.evaluation.report.content import Content
from finetune.evaluation.report.words import KINDS, less_is_better, meaning, number, plain, said, shorten


@dataclass(frozen=True)
class Score:
    """`low` and `high`: the 95% interval, None where there is none."""

    condition: str
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def meaning(self) -> str:
        return meaning(self.condition)


@dataclass(frozen=True)
class Finding:
    """`verdict`: "yes", "no" or "unclear"; `answer` gives the reason."""

    question: str
    verdict: str
    answer: str


@dataclass(frozen=True)
class Headline:
    """`scale`: the value that fills a bar."""

    task: str
    metric: str
    lead: str
    scores: list[Score]
    findings: list[Finding]
    scale: float


def headlines(content: Content) -> list[Headline]:
    intervals = content.metrics.get("intervals", {})
    found = []
    for task, metrics in content.metrics.get("scores", {}).items():
        told = [name for name, values in metrics.items() if values.get("tuned") is not None]
        if not told:
            continue
        metric = content.primary(task, told)
        between = intervals.get(task, {}).get(metric, {})
        scores = {
            condition: Score(
                condition, float(value), *(float(end) for end in between.get(condition) or () if end is not None)
            )
            for condition, value in metrics[metric].items()
            if value is not None
        }
        rows = [row for row in content.predictions if row.get("task") == task]
        kinds = sorted({kind for row in rows for kind in row.get("kinds", [])})
        highest = max(abs(score.high or score.value) for score in scores.values())
        found.append(
            Headline(
                task=task,
                metric=metric,
                lead=_lead(metric, scores["tuned"], len(rows)),
                scores=list(scores.values()),
                findings=[*_findings(metric, scores, kinds), *_commonest(metric, scores["tuned"], rows)],
                scale=(highest if less_is_better(metric) else max(highest, 1.0)) or 1.0,
            )
        )
    return found


def one_line(found: Sequence[Headline]) -> str:
    """The tasks' primary metrics, for a terminal."""
    lines = []
    for headline in found:
        tuned, *others = headline.scores
        between = f" [{number(tuned.low)}, {number(tuned.high)}]" if tuned.low is not None else ""
        beside = ", ".join(f"{plain(other.condition)} {number(other.value)}" for other in others)
        lines.append(f"{headline.task}: {plain(headline.metric)} {number(tuned.value)}{between}  ({beside})")
    return "; ".join(lines)


def compare(ours: Score, theirs: Score, less: bool) -> str:
    """ "yes" where ours is better and the intervals don't overlap, "no" where it isn't better, else "unclear"."""
    if (ours.value >= theirs.value) if less else (ours.value <= theirs.value):
        return "no"
    ours_at_worst = ours.high if less else ours.low
    theirs_at_best = theirs.low if less else theirs.high
    ours_at_worst = ours.value if ours_at_worst is None else ours_at_worst
    theirs_at_best = theirs.value if theirs_at_best is None else theirs_at_best
    return "yes" if (ours_at_worst < theirs_at_best if less else ours_at_worst > theirs_at_best) else "unclear"


def _lead(metric: str, tuned: Score, rows: int) -> str:
    between = (
        f" (95% interval {number(tuned.low)} to {number(tuned.high)})"
        if tuned.low is not None
        else " (no interval is known)"
    )
    less = "; less is better" if less_is_better(metric) else ""
    on = f"On {rows:,} rows that it wasn't trained on, its" if rows else "Its"
    return f"{on} {plain(metric)} is {number(tuned.value)}{between}{less}."


def _findings(metric: str, scores: Mapping[str, Score], kinds: Sequence[str]) -> list[Finding]:
    tuned, less, words = scores["tuned"], less_is_better(metric), plain(metric)
    found = []
    if base := scores.get("base"):
        verdict = compare(tuned, base, less)
        answer = f"{words} was {number(base.value)} before, and is {number(tuned.value)} after."
        found.append(Finding("Did training help?", verdict, answer))
    if kinds:
        noun = KINDS.get(kinds[0], ("", "media"))[1] if len(kinds) == 1 else "media"
        ways = {"blank": f"with nothing in the {noun}", "shuffled": f"with other rows' {noun}"}
        found += _needs(f"Does the answer depend on the {noun}?", tuned, scores, ways, words, less)
        for kind in kinds if len(kinds) > 1 else ():
            noun = KINDS.get(kind, (kind, kind))[1]
            ways = {f"blank_{kind}": f"with nothing in the {noun}"}
            found += _needs(f"Does it need the {noun}?", tuned, scores, ways, words, less)
    if probe := scores.get("probe"):
        answer = f"logistic regression on the encoder's features reaches {number(probe.value)}."
        found.append(
            Finding("Does it make more of the media than a linear probe?", compare(tuned, probe, less), answer)
        )
    return found


def _needs(
    question: str, tuned: Score, scores: Mapping[str, Score], ways: Mapping[str, str], words: str, less: bool
) -> list[Finding]:
    """Whether it is clearly worse in all of these ways of taking the media away."""
    there = {condition: way for condition, way in ways.items() if condition in scores}
    if not there:
        return []
    verdicts = {compare(tuned, scores[condition], less) for condition in there}
    verdict = verdicts.pop() if len(verdicts) == 1 else "unclear"
    worse = "rises" if less else "falls"
    listed = " and ".join(f"{number(scores[condition].value)} {way}" for condition, way in there.items())
    move = (
        f"{words} {worse} from {number(tuned.value)} to"
        if verdict == "yes"
        else f"{words} is {number(tuned.value)}, and"
    )
    return [Finding(question, verdict, f"{move} {listed}.")]


def _commonest(metric: str, tuned: Score, rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """For accuracy of labels: beside always giving the commonest of the right answers."""
    targets = Counter(said(row.get("target")) for row in rows)
    if metric != "accuracy" or not targets or any(isinstance(row.get("target"), list) for row in rows):
        return []
    target, count = targets.most_common(1)[0]
    share = Score("commonest", count / len(rows))
    answer = f"always saying “{shorten(target, 40)}” would reach {number(share.value)}."
    return [Finding("Does it beat the commonest answer?", compare(tuned, share, less=False), answer)]
