"""Pairs of answers to learn preferences from: a trained run answers several times, and its task, a person or another
model chooses.
"""

import base64
import csv
import json
import mimetypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.commands._judging import Comparison, Verdicts, judge_all
from finetune.commands.data_describe import LocalModel
from finetune.common import display
from finetune.common.errors import ArtifactError, DataError, RecipeError, given, option
from finetune.common.run_folder import RunFolder, RunLike
from finetune.data.describe.endpoint import Endpoint, is_address
from finetune.data.describe.options import DescribeOptions
from finetune.data.describe.rows_file import Origin, write_rows
from finetune.data.describe.run import Describer
from finetune.data.new_files import RowsAs
from finetune.data.rows import by_task, error_list, subset
from finetune.data.run_rows import splits_of_run
from finetune.data.sample import Message, Sample, texts_in
from finetune.evaluation.new_rows import NewRows
from finetune.model.trained_for import refuse_missing
from finetune.recipe.load import Recipe, load_recipe
from finetune.recipe.schema import chosen_task

if TYPE_CHECKING:
    from finetune.model.assistant import Assistant
    from finetune.model.bindings import TaskBinding

LETTERS = ("A", "B")
BATCH = 16  # answers sampled at once, at least those to one question


@dataclass(frozen=True)
class PairOptions:
    """How answers are sampled. `answers`: to each question; `limit`: most rows, drawn at random; `by`:
    who chooses, the task's own score or a person; `media_folder`, `encoding`: of other rows than the run's, see
    `predict`. `judge`: a model that chooses, in place of the score: a run, merged or adapter folder, a Hub id, or the
    http(s) address of an OpenAI-compatible endpoint; `asking`: how, see `DescribeOptions`.
    """

    answers: int = 4
    temperature: float = 1.0
    max_new_tokens: int = 64
    limit: int | None = None
    by: Literal["score", "person"] = "score"
    media_folder: Path | None = None
    encoding: str | None = None
    judge: RunLike | None = None
    asking: DescribeOptions | None = None


@dataclass(frozen=True)
class PairsResult:
    """`out`: the pairs, of `rows` rows; `ties`: rows whose answers are all equally good, or the same; `undecided`: rows
    that wait for a person, with their answers in `candidates`; `source`: the entry of a recipe's `data` that reads
    `out`; `verdicts`: of a judge, how many gave no pair; `errors`: 'row: reason' where it gave none.
    """

    out: Path
    rows: int
    pairs: int
    ties: int
    undecided: int
    candidates: Path | None
    source: str
    verdicts: str = ""
    errors: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.out}: {self.pairs:,} pairs from {self.rows:,} rows; {self.ties:,} without a difference"]
        lines += [self.verdicts] if self.verdicts else []
        if self.candidates is not None:
            lines[0] += f", {self.undecided:,} undecided"
            lines.append(
                f"to decide: finetune data label {self.candidates} --labels {','.join(LETTERS)} "
                f"--out {labels_of(self.out)} --page; then the same command again"
            )
        return "\n".join([*lines, *([f"in a recipe: {self.source}"] if self.pairs else [])])

    def _repr_html_(self) -> str:
        return display.preformatted(str(self))


@dataclass(frozen=True)
class Candidate:
    """A row with two answers; `chosen`: the number of the better one, None where nobody has decided yet; `judge`: the
    model that has decided.
    """

    sample: Sample
    answers: tuple[str, str]
    chosen: int | None = None
    judge: Origin | None = None


def data_pairs(
    run: RunLike,
    data: Path | str | None = None,
    *,
    out: Path | str = "pairs.jsonl",
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    options: PairOptions | None = None,
) -> PairsResult:
    """Sample answers of a trained run to its own training rows, or to those of a file, and write pairs that
    `objective: dpo` and its kin train on: of each row the best and the worst answer by the task's score. Held-out rows
    aren't used. With `by: "person"` two different answers go to OUT.candidates.jsonl for `data label`; called again,
    the labels in OUT.labels.csv become pairs. With a `judge`, another model compares two different answers, in both
    orders.

    `run`: a run folder; `task`: one of several that it was trained for; `columns`: of `data`, the task's column -> the
    file's. Raises RecipeError, DataError, ArtifactError; ModelError for a judge that doesn't answer: the same call then
    goes on with the answers in OUT.candidates.jsonl.
    """
    options, out = options or PairOptions(), Path(out)
    if out.suffix.lower() != ".jsonl":
        raise RecipeError(f"{given('out', out)}: the pairs are JSON lines: name a .jsonl file")
    judge = judge_of(options)
    folder = RunFolder.open(run, needs="adapter")
    if not folder.recipe.is_file():
        raise ArtifactError(f"{folder.path}: not a run folder: it has no recipe that names the rows")
    recipe = load_recipe(folder.recipe)
    samples = rows_of(
        folder, recipe, Path(data) if data else None, task, RowsAs(columns, options.media_folder, options.encoding)
    )
    samples = subset(samples, options.limit, recipe.seed)
    found = two_answers(out, samples, folder, options, recipe.seed)
    result = PairsResult(out, len(samples), 0, len(samples) - len(found), 0, None, "")
    if judge:
        found, verdicts = judged(found, judge())
        result = replace(result, verdicts=str(verdicts), errors=tuple(verdicts.errors))
    pairs = [one for one in found if one.chosen is not None]
    media = [medium for one in found for medium in one.sample.media]
    root = Path(os.path.commonpath([medium.path.parent for medium in media])) if media else None
    write_rows(out, [_pair(one, root) for one in pairs])
    if judge:
        candidates_path(out).unlink()
    kinds = ", ".join(sorted({medium.kind for medium in media}))
    folder_of_media = f", media_folder: {root}" if root else ""
    return replace(
        result,
        pairs=len(pairs),
        undecided=len(found) - len(pairs),
        candidates=candidates_path(out) if options.by == "person" else None,
        source=f"- {{path: {out.resolve()}, task: {{kind: chat, media: [{kinds}]}}{folder_of_media}}}",
    )


def judge_of(options: PairOptions) -> Callable[[], Describer] | None:
    """How the judge is loaded; an endpoint is reached at once. Raises RecipeError, ModelError, ArtifactError."""
    if options.judge is None:
        return None
    if options.by == "person":
        raise RecipeError(
            f"{given('judge', options.judge)}: a judge or a person chooses: leave out {given('by', 'person')}"
        )
    asking = options.asking or DescribeOptions()
    asking.refuse_unusable()
    if is_address(name := os.fspath(options.judge)):
        endpoint = Endpoint(name, asking)
        return lambda: endpoint
    refuse_missing(name)
    return lambda: LocalModel(name, asking)


def judged(found: Sequence[Candidate], judge: Describer) -> tuple[list[Candidate], Verdicts]:
    """The same, with what the judge chooses. Raises DataError, ModelError."""
    verdicts = judge_all([Comparison(one.sample.question, one.answers, one.sample.where) for one in found], judge)
    found = list(found)
    for number, (chosen, origin) in verdicts.better.items():
        found[number] = replace(found[number], chosen=chosen, judge=origin)
    return found, verdicts


def two_answers(
    out: Path, samples: Sequence[Sample], folder: RunFolder, options: PairOptions, seed: int
) -> list[Candidate]:
    """Two answers to each question that has two: sampled, or those of an earlier call that wait for a person or a
    judge. Raises RecipeError, DataError.
    """
    by_person, waits = options.by == "person", options.by == "person" or options.judge is not None
    decided = read_decided(out, samples, folder.path, judged=not by_person) if waits else None
    there = candidates_path(out) if by_person else out
    if (decided is None or not by_person) and there.exists():
        raise RecipeError(f"{there} exists already: remove it, or name another file with {option('--out', 'out=')}")
    if decided is not None:
        return decided
    from finetune.common.progress import fresh_memory
    from finetune.model.load import load

    found = [*candidates_of(samples, load(folder.path), options, seed)]
    fresh_memory()  # before a judge is loaded
    if waits:
        rows = [_labelling_row(one) if by_person else _candidates_row(one) for one in found]
        known = {"run": str(folder.path.resolve()), "rows": len(samples)}
        write_rows(candidates_path(out), [{**row, **known} for row in rows])
    return found


def rows_of(folder: RunFolder, recipe: Recipe, data: Path | None, task: str | None, rows_as: RowsAs) -> list[Sample]:
    """The training rows of a run, or the rows of `data`, with answers in free words. Raises RecipeError, DataError."""
    if data is not None:
        return NewRows.of(recipe, data, task, rows_as).samples(recipe.media)
    train = splits_of_run(folder, recipe).train
    names = by_task(train)
    name = chosen_task([*names], task)
    return [train[number] for number in names.get(name or "", [])]


def candidates_of(
    samples: Sequence[Sample], assistant: "Assistant", options: PairOptions, seed: int
) -> Iterator[Candidate]:
    """Two answers to each question: the best and the worst, or to be chosen from the first two that differ. Rows whose
    answers are equal, or equally good, give none. Raises RecipeError, DataError.
    """
    import torch

    from finetune.common.progress import bar
    from finetune.model.assistant import FileView

    for name in by_task(samples):
        binding = assistant.model.bindings.get(name)
        if binding is None or not binding.settings.free_text:
            raise RecipeError(f"the task {name!r} isn't answered in free words: there are no answers to sample")
    torch.manual_seed(seed)
    together = max(1, BATCH // options.answers)
    with bar("answers", len(samples)) as step:
        for start in range(0, len(samples), together):
            chunk = samples[start : start + together]
            texts = assistant.answers(
                [sample.question for sample in chunk for _ in range(options.answers)],
                max_new_tokens=options.max_new_tokens,
                view=FileView(assistant.encoders, assistant.limits),
                temperature=options.temperature,
            )
            for number, sample in enumerate(chunk):
                own = texts[number * options.answers : (number + 1) * options.answers]
                answers = list(dict.fromkeys(text for text in own if text))
                if options.by == "person" or options.judge is not None:
                    found = Candidate(sample, (answers[0], answers[1])) if len(answers) > 1 else None
                else:
                    found = best_and_worst(sample, answers, assistant.model.bindings[sample.task])
                if found is not None:
                    yield found
                step()


def best_and_worst(sample: Sample, answers: Sequence[str], binding: "TaskBinding") -> Candidate | None:
    """By the task's own measure of how good an answer is; None where all are equally good."""
    from finetune.data.sample import Answer
    from finetune.evaluation.scores import measured

    measures = measured(binding, [sample] * len(answers), [Answer(text) for text in answers])[1]
    good = [float(measure["good"]) for measure in measures]
    if not good or max(good) == min(good):
        return None
    return Candidate(sample, (answers[good.index(max(good))], answers[good.index(min(good))]), chosen=0)


def candidates_path(out: Path) -> Path:
    return out.with_suffix(".candidates.jsonl")


def labels_of(out: Path) -> Path:
    return out.with_suffix(".labels.csv")


def read_decided(out: Path, samples: Sequence[Sample], run: Path, judged: bool = False) -> list[Candidate] | None:
    """The candidates of an earlier call with what a person has chosen since, or, with `judged`, to be chosen from; None
    where there are none yet. Raises DataError where they are of another run or of other rows, or a label is neither of
    the letters.
    """
    path = candidates_path(out)
    if not path.is_file() or not (judged or labels_of(out).is_file()):
        return None
    labels = {} if judged else _labels(labels_of(out))
    by_place = {sample.where: sample for sample in samples}
    found, unknown = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if judged and "answers" in row:
            raise DataError(
                f"{path}: these answers wait for a person: leave out the judge, or name another file with "
                f"{option('--out', 'out=')}"
            )
        if row["run"] != str(run.resolve()):
            raise DataError(
                f"{path}:{number}: answers of the run {row['run']}, not of {run.resolve()}; name another file with "
                f"{option('--out', 'out=')}"
            )
        if (sampled := row.get("rows", len(samples))) != len(samples):
            raise DataError(
                f"{path}:{number}: answers to {sampled:,} rows were sampled, and this call is about {len(samples):,}; "
                f"call it as before, or name another file with {option('--out', 'out=')}"
            )
        if row["of"] not in by_place:
            unknown.append(str(row["of"]))
            continue
        label = labels.get(f"{path.name}:{number}", "")
        first, second = row["candidates"]
        chosen = LETTERS.index(label) if label else None
        found.append(Candidate(by_place[row["of"]], (first, second), chosen))
    if unknown:
        advice = f"name another file with {option('--out', 'out=')}"
        raise DataError(error_list(unknown, f"{path}: {len(unknown)} rows aren't among these; {advice}"))
    return found


def _labels(path: Path) -> dict[str | None, str]:
    """{row: A, B or ''}. Raises DataError."""
    labels = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            if (label := (row.get("label") or "").strip()) and label not in LETTERS:
                raise DataError(f"{path}: the label of {row.get('row')} is {label!r}; write A or B")
            labels[row.get("row")] = label
    return labels


def _pair(one: Candidate, root: Path | None) -> dict[str, Any]:
    """A conversation with both answers, as the format `messages` reads it; paths are relative to `root`."""
    assert one.chosen is not None
    chosen, rejected = one.answers[one.chosen], one.answers[1 - one.chosen]
    messages = [{"role": turn.role, "content": _content(turn, root)} for turn in one.sample.question]
    pair = {"messages": messages, "chosen": chosen, "rejected": rejected, "of": one.sample.where}
    return pair | ({"judge": asdict(one.judge)} if one.judge else {})


def _content(turn: Message, root: Path | None) -> list[dict[str, str]]:
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": part.kind, part.kind: os.path.relpath(part.path, root or ".")}
        for part in turn.content
    ]


def _labelling_row(one: Candidate) -> dict[str, Any]:
    """A row of the labelling page: its media, in the row itself as they may lie anywhere, its question and the two
    answers; lists aren't shown.
    """
    media: dict[str, list[str]] = {}
    for medium in one.sample.media:
        kind = mimetypes.guess_type(medium.path)[0] or "application/octet-stream"
        content = base64.b64encode(medium.path.read_bytes()).decode()
        media.setdefault(medium.kind, []).append(f"data:{kind};base64,{content}")
    choice = "\n".join(f"{letter}: {answer}" for letter, answer in zip(LETTERS, one.answers, strict=True))
    return {**media, "question": "\n".join(texts_in(one.sample.question)), "answers": choice, **_candidates_row(one)}


def _candidates_row(one: Candidate) -> dict[str, Any]:
    return {"candidates": one.answers, "of": one.sample.where}
