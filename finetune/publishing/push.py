"""Publish a run on the Hub: checked before, written in one commit, and then downloaded, loaded and asked again."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.common import hub
from finetune.common.certificate import read_verified
from finetune.common.errors import ArtifactError, FinetuneError, PublishError
from finetune.common.progress import console, fresh_memory, quiet_libraries
from finetune.common.run_folder import RunFolder, read_json, refuse_several_processes, whole_folder
from finetune.data.rows import Source
from finetune.data.sources import sources_of
from finetune.evaluation.report.content import Content, read_content
from finetune.model.assistant import Assistant
from finetune.model.load import load_adapter, load_merged
from finetune.publishing import card, checks, compare, staging, upload
from finetune.publishing.parts import Base, bases_of, data_licences, with_commits, with_licences
from finetune.recipe.load import load_recipe

SAME = 0.9  # share of the questions that must be answered as they were evaluated: rounding may change one in ten
SHOWN = 5  # rows named where fewer are


def push(
    run: Path | str,
    repo: str | None = None,
    *,
    merged: bool = False,
    private: bool | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Publish a run's adapter, or its merged model. `repo`: name, or user/name. `private`: of a new repository. None
    of either: as the recipe says. With True a repository that is there and public is refused.

    Returns {"checks": lines for people, "url": None for a dry run, "folder": the files as published, "commit"}. Raises
    ArtifactError for a run that hasn't got that far, PublishError with everything that mustn't be published as it is,
    for what the Hub refuses, and where what was downloaded answers otherwise than what is here.
    """
    quiet_libraries()
    refuse_several_processes("`finetune push`")
    folder = RunFolder.open(Path(run), needs="merged" if merged else "adapter")
    RunFolder.open(Path(run), needs="metrics")
    recipe = load_recipe(folder.recipe)
    repo = repo or recipe.publish.repo or (recipe.name if dry_run else None)
    if repo is None:
        raise PublishError(f"where to? Write --repo NAME, or publish.repo in {folder.recipe}")
    if not dry_run:
        repo = upload.full_name(repo)
    elif "/" not in repo:  # who is logged in isn't asked
        repo = f"user/{repo}"
    return push_plain(
        folder,
        repo=repo,
        sources=sources_of(recipe),
        recipe=recipe.model_dump(mode="json"),
        merged=merged,
        private=private,
        dry_run=dry_run,
        seed=recipe.seed,
        options=recipe.publish.model_dump(),
        **recipe.evaluate.model_dump(),
    )


def push_plain(
    folder: RunFolder,
    *,
    repo: str,
    sources: Sequence[Source],
    recipe: Mapping[str, Any],
    merged: bool,
    private: bool | None,
    dry_run: bool,
    seed: int,
    options: Mapping[str, Any],
    split: str,
    limit: int | None,
    max_new_tokens: int,
    batch: int,
) -> dict[str, Any]:
    """The same from plain values. `recipe`: as resolved, for the card; `options`: its `publish`."""
    kind = "merged" if merged else "adapter"
    here = folder.merged if merged else folder.adapter
    state = None if dry_run else upload.state_of(repo, recipe=recipe["name"], kind=kind, private=bool(private))
    staged, lines = folder.path / "published" / kind, []
    with whole_folder(staged) as partial:
        lines += stage(folder, partial, repo=repo, recipe=recipe, merged=merged, options=options, dry_run=dry_run)
    lines += checks.sizes(staged)
    if dry_run or state is None:
        return {"checks": lines, "url": None, "folder": str(staged), "commit": None}
    known = list(read_json(folder.adapter / "multimodal.json")["asks"])
    questions = compare.questions_of(
        folder, sources, known, seed=seed, split=split, limit=limit, batch=batch, max_new_tokens=max_new_tokens
    )
    said, line = answers_here(here, questions, folder.adapter)
    lines.append(line)
    parent, there = state
    private = options["private"] if private is None else private
    console.print(f"uploading {staged} to {repo}")
    message = f"{kind.capitalize()} model of recipe {recipe['name']}"
    commit = upload.upload(staged, repo, parent=parent, there=there, private=private, message=message)
    lines.append(downloaded_again(repo, commit, folder.path, questions, said))
    return {"checks": lines, "url": upload.address(repo), "folder": str(staged), "commit": commit}


def stage(
    folder: RunFolder,
    into: Path,
    *,
    repo: str,
    recipe: Mapping[str, Any],
    merged: bool,
    options: Mapping[str, Any],
    dry_run: bool,
) -> list[str]:
    """Write into `into` what is to be published; lines on what was checked. Raises PublishError with all that is
    wrong.
    """
    file = str(folder.recipe)
    bases = bases_of(recipe, read_json(folder.adapter / "multimodal.json"), options["hub_names"])
    problems = checks.unknown_parts(bases, [*options["licenses"], *options["hub_names"]], file)
    problems += checks.base_problems(bases, merged, file)
    bases = with_licences(bases, options["licenses"])
    data = data_licences(recipe, options["licenses"])
    problems += checks.licence_problems(bases, data, file)
    content = read_content(folder.path)
    problems += [f"{name}: {why}" for name, why in unfinished(content)]
    certificate, wrong = certified(folder) if merged else ({}, [])
    problems += wrong
    if not problems:
        bases = bases if dry_run or merged else with_commits(bases)
        write(folder, into, content, bases, data, certificate, repo=repo, recipe=recipe, merged=merged, options=options)
        private = [str(source["path"]) for source in recipe["data"]] + [base.here for base in bases]
        problems = checks.file_problems(into, checks.private_paths(folder.path, private))
    if problems:
        raise PublishError("\n".join([f"not published; {len(problems)} to put right:", *(f"- {p}" for p in problems)]))
    named = {**{base.key: base.licence for base in bases}, **data}
    lines = ["licences: " + ", ".join(f"{name}: {licence}" for name, licence in named.items())]
    lines.append("no paths of this machine, no tokens and no user's name in any file")
    lines += [f"certificate: belongs to these weights ({certificate['merged_into']})"] if merged else []
    if pictures := len(list(into.glob("samples/*"))):
        lines.append(f"samples/: {pictures} pictures of held-out rows become readable with the card")
    return lines


def write(
    folder: RunFolder,
    into: Path,
    content: Content,
    bases: Sequence[Base],
    data: Mapping[str, str | None],
    certificate: Mapping[str, Any],
    *,
    repo: str,
    recipe: Mapping[str, Any],
    merged: bool,
    options: Mapping[str, Any],
) -> None:
    """The model's files, recipe, card, samples, manifest."""
    if merged:
        staging.stage_merged(folder.merged, into, bases, certificate)
    else:
        staging.stage_adapter(folder.adapter, into, bases)
    published = staging.published_recipe(recipe, bases, repo)
    staging.write_recipe(into, published)
    adapter = staging.named(content.adapter, bases)
    clean = replace(content, recipe=published, adapter=adapter, certificate=dict(certificate))
    card.write_card(into, clean, repo=repo, merged=merged, bases=bases, data=data, options=options)
    staging.write_manifest(into, recipe=recipe["name"], kind="merged" if merged else "adapter")


def unfinished(content: Content) -> list[tuple[str, str]]:
    """What the card needs and the run doesn't have."""
    lacking = []
    if not content.metrics.get("scores"):
        lacking.append(("metrics.json", "holds no scores; run `finetune evaluate`"))
    if not content.predictions:
        lacking.append(("predictions.jsonl", "isn't there; run `finetune evaluate`"))
    return lacking


def certified(folder: RunFolder) -> tuple[dict[str, Any], list[str]]:
    """The certificate of the merged model, and what is wrong with it."""
    try:
        return read_verified(folder), []
    except ArtifactError as error:
        return {}, [str(error)]


def loaded(path: Path) -> Assistant:
    return load_adapter(path) if (path / "multimodal.json").is_file() else load_merged(path)


def answers_here(path: Path, questions: compare.Questions, adapter: Path) -> tuple[dict[str, list[Any]], str]:
    """What the model in the run says, and a line. Raises PublishError where fewer than SAME of the rows are answered as
    they were evaluated. A merged model may answer otherwise, as far as its certificate tells, if its adapter doesn't.
    """
    said = questions.asked_of(loaded(path))
    fresh_memory()
    same, rows = compare.equal(said, questions.evaluated), len(questions)
    line = f"{same} of {rows} held-out rows are answered as they were evaluated"
    if same >= SAME * rows:
        return said, line
    if path != adapter:
        return said, f"{line}; by its adapter, {answers_here(adapter, questions, adapter)[1]}"
    different = compare.differences(questions, said, questions.evaluated)
    where, now, then = different[0]
    named = ", ".join(row for row, _, _ in different[:SHOWN]) + (", ..." if len(different) > SHOWN else "")
    raise PublishError(
        f"{path}: only {line}, {SAME:.0%} must be; the others: {named} ({where}: {now!r}, then {then!r}): what is on "
        "the card isn't of this model; run `finetune evaluate` again"
    )


def downloaded_again(
    repo: str, commit: str, run: Path, questions: compare.Questions, said: Mapping[str, Sequence[Any]]
) -> str:
    """A line: that what is on the Hub, fetched into an empty cache, answers as what is here. Raises PublishError."""
    online = f"{repo} is online (commit {commit[:12]}), but unproved"
    try:
        with tempfile.TemporaryDirectory(dir=run) as cache:
            got = questions.asked_of(loaded(hub.fetched(repo, commit, Path(cache))))
    except FinetuneError as error:
        raise PublishError(f"{online}: downloaded again, it can't be loaded: {error}. Then push again") from error
    finally:
        fresh_memory()
    same, rows = compare.equal(got, said), len(questions)
    if same < rows:
        where, theirs, ours = compare.differences(questions, got, said)[0]
        raise PublishError(
            f"{repo} is online (commit {commit[:12]}), but {rows - same} of {rows} held-out rows are answered "
            f"otherwise than here ({where}: {theirs!r}, here {ours!r}): its LLM or an encoder has other weights on the "
            "Hub; see publish.hub_names. Until then make the repository private, or delete it"
        )
    return f"downloaded into an empty cache and loaded: {same} of {rows} rows are answered as here"
