"""A recipe for a file or folder of a user's rows: what is in them, what can be learned, which parts fit a card."""

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from finetune.commands._init import cards, measure
from finetune.commands._init.columns import MEDIA, Column, describe_columns, file_names, language_of
from finetune.commands._init.files import SPLITS, Found, MediaPlace, find, hosts_of, media_beside, media_place
from finetune.commands._init.task import (
    FEWEST_GROUPS,
    TEXTLESS,
    Named,
    Task,
    Yaml,
    answers_in,
    fields_in,
    no_column,
    task_for,
)
from finetune.commands._init.text import Draft, WrittenSource
from finetune.commands.check import refuse_multimodal
from finetune.common import display
from finetune.common.errors import OVERWRITE, DataError, RecipeError, given, option
from finetune.common.run_folder import write_text
from finetune.data.rows import TOGETHER, error_list
from finetune.model.base.config import media_in_config
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Llm, Source
from finetune.training.lengths import fetch, settings_of

EXAMINED = 20_000  # rows by which columns are described
TOO_FEW = 30  # rows, of which the test has so few that one answer moves the score by a sixth or more
FEW = 500  # rows, of which a larger share is held out
SEEDS = range(7, 27)
GENERIC = {*SPLITS, "labels", "label", "data", "dataset", "metadata", "annotations", "rows", "table", "index"}
SHOWN = 6  # labels, or columns, in the summary


@dataclass(frozen=True)
class Choices:
    """What `init` doesn't have to guess. `answer`, `text` (one or several), `question`, `group`: columns; `prompt`: the
    question where it isn't in the rows; `card`: see `finetune init --help`; `encoding`: of a CSV or TSV file;
    `hold_out`: share of test rows; `encoders`: Hub ids or folders, with two media as 'image=FOLDER'.
    """

    task: str | None = None
    answer: str | None = None
    prompt: str | None = None
    text: str | Sequence[str] = ()
    question: str | None = None
    group: str | None = None
    encoding: str | None = None
    name: str | None = None
    card: str | None = None
    language: str | None = None
    hold_out: float | None = None
    llm: str | None = None
    encoders: Sequence[str] = ()
    media_folder: Path | str | None = None


@dataclass(frozen=True)
class Question:
    """`parse`: raises RecipeError for an answer that can't be taken."""

    text: str
    default: str
    parse: Callable[[str], object]


Ask = Callable[[Question], str]
Value = TypeVar("Value")


@dataclass(frozen=True)
class InitPlan:
    """All that is decided before the rows are read as samples. `encoders`: medium -> name of another encoder;
    `is_base`: whether `llm` is an existing model that takes media; `media_beside`: what is in a folder that was named.
    """

    target: Path
    name: str
    found: tuple[Found, ...]
    columns: tuple[Column, ...]
    places: tuple[MediaPlace, ...]
    hosts: tuple[str, ...]
    task: Task
    prompt: str
    language: str
    card: cards.InitCard
    hold_out: float
    llm: str | None
    encoders: Mapping[str, str]
    is_base: bool = False
    media_beside: str = ""


@dataclass(frozen=True, repr=False)
class Written:
    """`path`: the recipe, for which the whole stands as a path too; `summary`: lines on what was found and chosen;
    `wrong`: errors of rows that can't be used.
    """

    path: Path
    summary: tuple[str, ...]
    wrong: tuple[str, ...]

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        lines = [*self.summary, f"{self.path}: written"]
        if self.wrong:
            lines.append(error_list(self.wrong, f"{len(self.wrong)} row{'s' * (len(self.wrong) > 1)} can't be used"))
        return "\n".join([*lines, f"next: {self._next}"])

    @property
    def _next(self) -> str:
        """In the words of whoever called."""
        flag, text = shlex.quote(str(self.path)), repr(str(self.path))
        if self.wrong:
            cleaned = f"cleaned-{self.path.stem}"
            return option(
                f"finetune data check {flag} --fix {cleaned}", f"finetune.data_check({text}, fix={cleaned!r})"
            )
        return option(
            f"finetune check {flag}, then finetune run {flag}", f"finetune.check({text}), then finetune.run({text})"
        )

    def _repr_html_(self) -> str:
        return display.preformatted(repr(self))


def init(path: Path | str, *, out: Path | str | None = None, overwrite: bool = False, **choices: Any) -> Written:
    """Write a recipe for the rows of a file or folder into OUT, by default NAME.yaml in this folder. The result stands
    for its path where one is taken. `choices`: fields of `Choices`; what they leave open is taken from the rows.

    Raises DataError where there are no usable rows; RecipeError for a choice that doesn't fit them, and for a file that
    exists, without `overwrite`.
    """
    chosen, target = Choices(**choices), Path(out) if out else None
    return write_recipe(Path(path), chosen, lambda question: question.default, target, overwrite)


def write_recipe(path: Path, choices: Choices, ask: Ask, out: Path | None, overwrite: bool) -> Written:
    """The same; `ask` answers what `choices` leave open: at most five questions. Raises what `init` raises."""
    plan = _plan(path, choices, ask, out)
    if plan.target.exists() and not overwrite:
        names = option("--name or --out", "name= or out=")
        raise RecipeError(f"{plan.target} exists already; choose another {names}, or give {option(*OVERWRITE)}")
    keys = [_source_keys(plan, file, place) for file, place in zip(plan.found, plan.places, strict=True)]
    sources = [_source(file, of_file) for file, of_file in zip(plan.found, keys, strict=True)]
    read = [measure.usable_rows(source) for source in sources]
    seed = _seed(read[0], sources[0])
    sizes = measure.media_sizes([sample for rows in read for sample in rows.samples])
    parts = {medium: _parts(plan, medium) for medium in plan.task.media}
    trained_head = sources[0].head.trained
    tokens = {medium: part.tokens for medium, part in parts.items()}
    held_out = measure.held_out(read[0], sources[0], seed)
    schedule = measure.schedule(
        measure.lengths([sample for rows in read for sample in rows.samples], tokens, sizes),
        len(read[0].samples) - held_out,
        plan.card.tokens,
        (bool(parts) and not plan.is_base) or trained_head,
    )
    base = plan.target.parent
    draft = Draft(
        title=f"{plan.name}: {_one_line(_about(plan.task))}",
        name=plan.name,
        seed=seed,
        card=plan.card,
        llm=cards.llm_of(plan.card, plan.language, plan.llm and _relative(plan.llm, base)),
        media=parts,
        sources=[
            WrittenSource(_written_path(file.path, base), _with_paths(of_file, base))
            for file, of_file in zip(plan.found, keys, strict=True)
        ],
        schedule=schedule,
        trained_head=trained_head,
        is_base=plan.is_base,
        validates=any(file.split == "validation" for file in plan.found),
    )
    _write_checked(plan.target, draft.text())
    counts = _counts(plan.found, read, held_out)
    wrong = tuple(error for rows in read for error in rows.wrong)
    return Written(plan.target, (*_summary(plan, draft, sizes), counts), wrong)


def _write_checked(path: Path, text: str) -> None:
    """Raises RecipeError, and leaves what is there, if the text isn't a recipe that can be read."""
    unchecked = path.with_name(f".{path.name}.unchecked")
    write_text(unchecked, text)
    try:
        load_recipe(unchecked)
        os.replace(unchecked, path)
    except RecipeError as error:
        raise RecipeError(str(error).replace(str(unchecked), str(path))) from None
    finally:
        unchecked.unlink(missing_ok=True)


def _plan(path: Path, choices: Choices, ask: Ask, out: Path | None) -> InitPlan:
    found = find(path, choices.encoding)
    by_file = [measure.examined(file, EXAMINED) for file in found]
    rows = [row for of_file in by_file for row in of_file]
    described = describe_columns(rows)
    media = [column.name for column in described if column.kind in MEDIA]
    names = [{name: file_names(row.get(name) for row in of_file) for name in media} for of_file in by_file]
    folder = Path(choice) if (choice := choices.media_folder) else None
    places = tuple(media_place(file, of_file, folder) for file, of_file in zip(found, names, strict=True))
    columns = tuple(column for column in described if column.name not in places[0].missing)
    task, language = _task(columns, choices, ask, found[0].path)
    prompt = task.prompt
    if task.kind != "chat":
        prompt = _settled(choices.prompt, ask, Question("The question to the model", prompt, _one_line), _one_line)
    question = Question("Name of the run", _default_name(found[0].path, path), _valid_name)
    name = _settled(choices.name, ask, question, _valid_name)
    usual_card = "" if choices.card else cards.this_card().name
    question = Question(f"Card ({', '.join(cards.NAMES)}, or GB of memory)", usual_card, cards.card_of)
    card = _settled(choices.card, ask, question, cards.card_of)
    share = choices.hold_out
    if any(file.split == "test" for file in found):
        hold_out = _share(f"{share:g}") if share else 0.0
    else:
        question = Question("Share of the rows that is held out as test", "0.2" if len(rows) < FEW else "0.1", _share)
        hold_out = _settled(None if share is None else f"{share:g}", ask, question, _share)
    media = [task.columns.get(kind, kind) for kind in task.media]
    hosts = hosts_of(name for of_file in names for column in media for name in of_file.get(column, ()))
    return InitPlan(
        out or Path(f"{name}.yaml"),
        name,
        found,
        columns,
        places,
        tuple(hosts),
        task,
        prompt,
        language,
        card,
        hold_out,
        _llm(llm) if (llm := choices.llm) else None,
        _encoders(choices.encoders, task.media),
        bool(choices.llm) and _takes_media(str(choices.llm), task.media),
        media_beside(found[0].path) if path.is_dir() else "",
    )


def _task(columns: Sequence[Column], choices: Choices, ask: Ask, path: Path) -> tuple[Task, str]:
    """The task and its language."""
    texts = (choices.text,) if isinstance(choices.text, str) else (*choices.text,)
    named = Named(choices.task, texts, choices.question, choices.group)
    likely = answers_in(columns, named)
    if choices.task == "extract" and choices.answer is None and all(column.kind != "json" for column in likely):
        likely = [fields_in(columns, named)]
    by_name = {column.name: column for column in columns}

    def known(name: str) -> Column:
        if name not in by_name:
            raise no_column("answer", name, columns)
        return by_name[name]

    if choices.answer is None and not likely:
        kinds = ", ".join(f"{column.name} ({column.kind})" for column in columns)
        raise DataError(
            f"{path}: no column could be the answer. Looked for labels, numbers, boxes, JSON, conversations and text "
            f"beside media and ids. Its columns: {kinds}; add one, or name it with {option('--answer', 'answer=')}"
        )
    if len(likely) == 1 and choices.answer is None:
        answer = likely[0]
    else:
        text = f"The column of the answers ({', '.join(column.name for column in likely)})"
        question = Question(text, likely[0].name if likely else "", known)
        answer = _settled(choices.answer, ask, question, known)
    language = choices.language
    language = language or language_of(_texts(columns, task_for(columns, answer, named, language or "en")))
    task = task_for(columns, answer, named, language)
    if choices.answer is None:
        unread = [c.name for c in likely if c.name in task.unused and len(c.texts) > 1]
        others = [name for name in unread if name not in (task.group, task.few_people)]
        task = replace(task, alternatives=tuple(others))
    return task, language


def _settled(choice: str | None, ask: Ask, question: Question, parse: Callable[[str], Value]) -> Value:
    return parse(ask(question) if choice is None else choice)


def _texts(columns: Sequence[Column], task: Task) -> list[str]:
    """Of the columns that the task reads; of all, where these hold no letters."""
    used = [text for column in columns if column.name not in task.unused for text in column.texts[:1000]]
    return used if any(map(str.isalpha, "".join(used))) else [text for c in columns for text in c.texts[:1000]]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _valid_name(name: str) -> str:
    if not re.fullmatch("[a-z0-9][a-z0-9._-]*", name):
        raise RecipeError(
            f"{given('name', repr(name))}: write small letters, digits, '.', '_' and '-', a letter or digit first"
        )
    return name


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 0.9:
        raise RecipeError(
            f"{given('hold_out', text)}: write a share above 0, at most 0.9; without test rows nothing is scored"
        )
    return share


def _default_name(file: Path, path: Path) -> str:
    """After what was named, a file or a folder; after the file or its folder where that name says nothing."""
    for place in (path.resolve(), file, file.resolve().parent):
        candidate = place.stem if place.is_file() else place.name
        name = re.sub("[^a-z0-9._-]+", "-", candidate.lower()).strip("-._")
        if name and name not in GENERIC:
            return name
    return "finetuned"


def _encoders(names: Sequence[str], media: Sequence[str]) -> dict[str, str]:
    encoders: dict[str, str] = {}
    for name in names:
        medium, equals, encoder = name.partition("=")
        if not equals and len(media) == 1:
            medium, encoder = media[0], name
        if medium not in media or not encoder:
            needed = ", ".join(f"{kind}=NAME" for kind in media) or "none: no column of these rows names media files"
            raise RecipeError(f"{option(f'--encoder {name}', f'encoders={name!r}')}: write {needed}")
        encoders[medium] = _model(encoder)
    return encoders


def _model(name: str) -> str:
    """A Hub id, or a path that exists. Raises RecipeError for another path: by its form, or since its parent exists."""
    first, *rest = Path(name).parts
    local = name.startswith((".", "/", "~")) or len(rest) > 1 or (rest and Path(first).is_dir())
    if local and not Path(name).expanduser().exists():
        raise RecipeError(f"{name}: no such file or folder; name a Hub id, or a folder of a model")
    return name


def _llm(name: str) -> str:
    """The same, and where its config is at hand or the Hub can be reached, that of a text-only LLM."""
    if not Path(local := str(Path(_model(name)).expanduser())).exists():
        fetch(name, None, ["config.json"])
    if not media_in_config(settings_of(local, None, "config.json")):
        list(refuse_multimodal(Llm(name=local)))  # its notes, where there is no config, are those of `check`
    return name


def _takes_media(name: str, media: Sequence[str]) -> bool:
    """Whether a model is a base, by its config. Raises RecipeError where it lacks one of the rows' media."""
    own = media_in_config(settings_of(str(Path(name).expanduser()), None, "config.json"))
    if own and (foreign := [medium for medium in media if medium not in own]):
        raise RecipeError(f"{given('llm', name)}: takes {' and '.join(own)}, and these rows have {foreign[0]}")
    return bool(own)


def _source_keys(plan: InitPlan, found: Found, place: MediaPlace) -> Yaml:
    """The keys of a source but `path`, in the order in which they are written; paths are absolute."""
    keys: Yaml = {}
    task = plan.task
    if options := found.format.options.model_dump(mode="json", exclude_unset=True):
        keys["format"] = {"kind": found.format.kind, **options}
    if place.folder:
        keys["media_folder"] = str(place.folder.absolute())
    if place.outside:
        keys["outside_media_folder"] = True
    if plan.hosts:
        keys["hosts"] = [*plan.hosts]
    if task.columns:
        keys["columns"] = task.columns
    keys["task"] = task.written(plan.prompt)
    if task.head != "language":
        keys["head"] = task.head
    if found.split != "train":
        return keys | {"split": found.split}
    return keys | ({"hold_out": plan.hold_out} if plan.hold_out else {}) | ({"group": task.group} if task.group else {})


def _source(found: Found, keys: Yaml) -> Source:
    source: Source = Source.model_validate(keys | {"path": found.path})
    return source


def _seed(rows: measure.Rows, source: Source) -> int:
    """The first by which both sides of a hold-out get rows, which chance denies to a few."""
    if not source.hold_out:
        return SEEDS[0]
    return next((s for s in SEEDS if 0 < measure.held_out(rows, source, s) < len(rows.samples)), SEEDS[0])


def _parts(plan: InitPlan, medium: str) -> cards.MediumParts:
    name = plan.encoders.get(medium)
    folder = Path(name) if name and Path(name).is_dir() else None
    return cards.parts_of(medium, plan.card, name and _relative(name, plan.target.parent), folder)


def _relative(name: str, base: Path) -> str:
    """A Hub id as it is; a local folder or file relative to the recipe's folder."""
    if not Path(name).exists():
        return name
    path = _written_path(Path(name), base)
    return path if path.startswith((".", "/")) else f"./{path}"


def _written_path(path: Path, base: Path) -> str:
    return Path(os.path.relpath(path, base)).as_posix()  # not resolved: links stay as the user knows them


def _with_paths(keys: Yaml, base: Path) -> Yaml:
    folder = keys.get("media_folder")
    return keys | ({"media_folder": _written_path(Path(str(folder)), base)} if folder else {})


def _about(task: Task) -> str:
    media = " and ".join(task.media) or "text"
    answer = f"column {task.answer.name!r}" if task.answer.name else "a column per field"
    return f"{task.kind}, {media} -> {answer}"


def _summary(plan: InitPlan, draft: Draft, sizes: Sequence[measure.MediaSizes]) -> list[str]:
    task, first = plan.task, plan.found[0]
    how = f" ({first.reading})" if first.reading else ""
    lines = [f"{first.path}: format {first.format.kind}{how}, columns {', '.join(c.name for c in plan.columns)}"]
    lines += [f"{size.kind}: {size.number:,} files, {size.text}" for size in sizes]
    if not task.media and plan.media_beside:
        lines.append(
            f"not used: {plan.media_beside}, which no column names: write a column of their paths, suffix included"
        )
    answer = f"answer: {task.answer.name!r}, {task.answer.kind}"
    if not task.answer.name:
        fields = len(task.answer.texts)
        answer = f"answer: JSON of {fields} columns: {_shown(task.answer.texts)}; `fields` in the recipe has them all"
    if task.kind == "classify":
        answer += f", {len(task.answer.texts)} labels: {_shown(task.answer.texts)}"
        if task.answer.rare:
            answer += f"; rare: {_shown([f'{label} ({count})' for label, count in task.answer.rare])}"
    lines.append(answer)
    if task.alternatives:
        others = _shown(task.alternatives)
        lines.append(
            f"other columns that could be the answer: {others}; {option('--answer COLUMN', 'answer=')} names one"
        )
    lines.append(f"task: {task.kind}; language: {plan.language or 'neither English nor Chinese'}")
    if missing := plan.places[0].missing:
        lines.append(f"no files of: {', '.join(missing)}")
    if task.group:
        lines.append(f"group: rows of one {task.group!r} are never both in training and in the test")
    if task.few_people:
        lines.append(
            f"no group: {task.few_people!r} has fewer than {FEWEST_GROUPS} values, so the same are in training and in "
            f"the test; `group: {task.few_people}` in the recipe, with a larger hold_out, tests on others"
        )
    if unused := [name for name in task.unused if name != task.group]:
        hint = f" ({option('--text COLUMN', 'text=')} puts one before the question; it must not give the answer away)"
        lines.append(f"not used: {_shown(unused)}{'' if task.kind in TEXTLESS else hint}")
    models = [draft.llm["name"]]
    models += [] if draft.is_base else [parts.encoder["name"] for parts in draft.media.values()]
    lines.append(f"model for {plan.card.title}: {', '.join(map(str, models))}")
    return lines


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _counts(found: Sequence[Found], read: Sequence[measure.Rows], held_out: int) -> str:
    counts = {file.split: len(rows.samples) for file, rows in zip(found, read, strict=True)}
    counts["train"] -= held_out
    counts["test"] = counts.get("test", 0) + held_out
    hint = "" if counts["test"] else "; too few for a test: label more, or hold out a larger share"
    if not counts["test"] and (sets := measure.sets(read[0])) < counts["train"]:
        hint = f"; none for a test: {TOGETHER}, here {sets:,} set{'s' * (sets > 1)}; write a file of other rows for it"
    if sum(counts.values()) < TOO_FEW:
        hint = f"; fewer than {TOO_FEW} are too few to train and score well: label more, a few hundred if you can"
    return "rows: " + ", ".join(f"{count:,} {split}" for split, count in counts.items()) + hint
