"""Publish a run on the Hub: checked before, written in one commit, then downloaded, loaded and compared."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.common import display, hub
from finetune.common.certificate import Certificate, read_verified
from finetune.common.errors import ArtifactError, FinetuneError, PublishError, option
from finetune.common.progress import console, fresh_memory, quiet_libraries
from finetune.common.run_folder import RunFolder, RunLike, refuse_several_processes, whole_folder, write_text
from finetune.evaluation.report.content import Content, read_content
from finetune.model.load import load_folder
from finetune.publishing import card, checks, compare, staging, upload
from finetune.publishing.parts import Publication, bases_of, data_licences, with_commits, with_licences
from finetune.recipe.load import Recipe, dump_recipe, load_recipe

MIN_EQUAL = 0.9  # share of rows answered as they were evaluated: rounding may change one in ten
SHOWN = 5  # rows named in an error


@dataclass(frozen=True, repr=False)
class Pushed:
    """`checks`: lines for people; `folder`: the files as published; `url`, `commit`: None for a dry run."""

    checks: list[str]
    folder: Path
    url: str | None = None
    commit: str | None = None

    def __repr__(self) -> str:
        return (
            f"Pushed: {self.url} (commit {self.commit})" if self.url else f"Pushed: nothing yet; files in {self.folder}"
        )

    def _repr_html_(self) -> str:
        return "".join([*map(display.line, [repr(self), *self.checks]), display.files({"files": self.folder})])


def push(
    run: RunLike,
    repo: str | None = None,
    *,
    merged: bool = False,
    private: bool | None = None,
    dry_run: bool = False,
) -> Pushed:
    """Publish a run's adapter, or its merged model. `repo`: name, or user/name; None: as the recipe says. `private`: of
    a new repository; None: as the recipe says; with True an existing public one is refused.

    Raises ArtifactError if the run isn't evaluated (or merged) yet; PublishError with everything that must be put right
    first, with what the Hub refuses, and if the downloaded model answers otherwise than the one here.
    """
    quiet_libraries()
    refuse_several_processes("`finetune push`")
    folder = RunFolder.open(run, needs="merged" if merged else "adapter")
    RunFolder.open(run, needs="metrics")
    recipe = load_recipe(folder.recipe)
    repo = repo or recipe.publish.repo or (recipe.name if dry_run else None)
    if repo is None:
        raise PublishError(f"no repository: write {option('--repo NAME', 'repo=')}, or publish.repo in {folder.recipe}")
    repo = upload.checked(repo if "/" in repo else f"user/{repo}") if dry_run else upload.full_name(repo)
    kind = "merged" if merged else "adapter"
    before = None if dry_run else upload.state_of(repo, recipe=recipe.name, kind=kind, private=bool(private))
    staged = folder.path / "published" / kind
    with whole_folder(staged) as partial:
        lines = stage(folder, recipe, partial, repo=repo, merged=merged, offline=dry_run)
    lines += checks.sizes(staged)
    if before is None:
        return Pushed(lines, staged)
    questions = compare.questions_of(folder, recipe)
    predictions, line = answers_here(folder.merged if merged else folder.adapter, questions, folder.adapter)
    lines.append(line)
    console.print(f"uploading {staged} to {repo}")
    private = recipe.publish.private if private is None else private
    message = f"{kind.capitalize()} model of recipe {recipe.name}"
    commit = upload.upload(staged, repo, before, private=private, message=message)
    lines.append(compare_downloaded(repo, commit, folder.path, questions, predictions))
    return Pushed(lines, staged, upload.address(repo), commit)


def stage(folder: RunFolder, recipe: Recipe, into: Path, *, repo: str, merged: bool, offline: bool) -> list[str]:
    """Write what is to be published into `into`; returns lines on what was checked. Raises PublishError with everything
    that is wrong.
    """
    content = read_content(folder.path)
    bases = bases_of(recipe, content.commits)
    problems = checks.unknown_parts(bases, [*recipe.publish.licenses, *recipe.publish.hub_names], folder.recipe)
    problems += checks.base_problems(bases, merged, folder.recipe)
    bases, licences = with_licences(bases, recipe.publish.licenses), data_licences(recipe)
    problems += checks.licence_problems(bases, licences, folder.recipe)
    problems += unfinished(content)
    certificate: Certificate | None = None
    if merged:
        try:
            certificate = read_verified(folder)
        except ArtifactError as error:
            problems.append(str(error))
    if not problems:
        bases = bases if offline or merged else with_commits(bases)
        published = staging.published_recipe(recipe, bases, repo)
        if certificate is not None:
            certificate = staging.stage_merged(folder.merged, into, bases, certificate)
        else:
            staging.stage_adapter(folder.adapter, into, bases)
        write_text(into / "recipe.yaml", dump_recipe(published))
        commits = {base.key: base.revision for base in bases}
        content = replace(content, recipe=published, commits=commits, certificate=certificate)
        card.write_card(into, Publication(repo, merged, published, content, bases, licences))
        local = [str(source.path) for source in recipe.data] + [base.path for base in bases]
        problems = checks.file_problems(into, checks.private_paths(folder.path, local))
    if problems:
        raise PublishError("\n".join([f"not published; {len(problems)} to put right:", *(f"- {p}" for p in problems)]))
    named = {**{base.key: base.licence for base in bases}, **licences}
    lines = ["licences: " + ", ".join(f"{name}: {licence}" for name, licence in named.items())]
    lines.append("no path of this run, its data or the home folder in any file")
    if certificate is not None:
        lines.append(f"certificate: belongs to these weights ({certificate.merged_into})")
    if pictures := len(list(into.glob("samples/*"))):
        lines.append(f"samples/: {pictures} pictures of held-out rows become as public as the card")
    return lines


def unfinished(content: Content) -> list[str]:
    """What the card needs and the run doesn't have."""
    missing = []
    if not content.metrics.scores:
        missing.append("metrics.json: holds no scores; run `finetune evaluate`")
    if not content.predictions:
        missing.append("predictions.jsonl: is missing or empty; run `finetune evaluate`")
    return missing


def answers_here(path: Path, questions: compare.HeldOutQuestions, adapter: Path) -> tuple[compare.Predictions, str]:
    """Predictions of the model in the run, and a line. Raises PublishError if fewer than MIN_EQUAL of the rows are
    answered as they were evaluated; a merged model may differ, as far as its certificate allows, if its adapter
    doesn't.
    """
    predictions = questions.predictions_of(load_folder(path))
    fresh_memory()
    different, rows = compare.differences(questions, predictions, questions.evaluated), len(questions)
    line = f"{rows - len(different)} of {rows} held-out rows are answered as they were evaluated"
    if rows - len(different) >= MIN_EQUAL * rows:
        return predictions, line
    if path != adapter:
        return predictions, f"{line}; by its adapter, {answers_here(adapter, questions, adapter)[1]}"
    where, now, then = different[0]
    names = ", ".join(row for row, _, _ in different[:SHOWN]) + (", ..." if len(different) > SHOWN else "")
    raise PublishError(
        f"{path}: only {line}, {MIN_EQUAL:.0%} must be; the others: {names} ({where}: {now!r}, then {then!r}): the "
        "card would show another model's scores; run `finetune evaluate` again"
    )


def compare_downloaded(
    repo: str, commit: str, run: Path, questions: compare.HeldOutQuestions, predictions: compare.Predictions
) -> str:
    """A line: the model on the Hub, downloaded into an empty cache, answers as the one here. Raises PublishError."""
    online = f"{repo} is online (commit {commit[:12]})"
    try:
        with tempfile.TemporaryDirectory(dir=run) as cache:
            downloaded = questions.predictions_of(load_folder(hub.fetched(repo, commit, Path(cache))))
    except FinetuneError as error:
        raise PublishError(f"{online}, but can't be loaded from there: {error}. Then push again") from error
    finally:
        fresh_memory()
    different, rows = compare.differences(questions, downloaded, predictions), len(questions)
    if different:
        where, theirs, ours = different[0]
        raise PublishError(
            f"{online}, but {len(different)} of {rows} held-out rows are answered otherwise than here ({where}: "
            f"{theirs!r}, here {ours!r}): its LLM or an encoder has other weights on the Hub; see publish.hub_names. "
            "Until then make the repository private, or delete it"
        )
    return f"downloaded into an empty cache and loaded: {rows} of {rows} rows are answered as here"
