"""The commands of `finetune data`: parse, call one function, print."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from finetune.commands._options import (
    Columns,
    Encoding,
    KeyVariable,
    MediaFolder,
    ModelName,
    RecipeFile,
    Run,
    Set,
    columns_of,
)
from finetune.common.errors import RecipeError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at rows, split, label and write them.")


@app.command("check")
def data_check(
    recipe: RecipeFile,
    set_: Set = None,
    fix: Annotated[Path | None, typer.Option(metavar="DIR", help="Write a cleaned copy and a recipe for it.")] = None,
    copy_media: Annotated[bool, typer.Option(help="Copy media there too.")] = False,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes; default: one a core.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the report; default: runs/NAME-check.")
    ] = None,
) -> None:
    """Examine every row and medium before training. Exit status 2 where errors remain."""
    from finetune.commands.data_check import data_check
    from finetune.commands.tables import print_findings

    result = data_check(recipe, set_ or [], fix=fix, copy_media=copy_media, workers=workers, out=out)
    print_findings(result)
    if result.errors and not (result.fixed and result.fixed.clean):
        raise typer.Exit(2)


@app.command("preview")
def data_preview(
    recipe: RecipeFile,
    set_: Set = None,
    rows: Annotated[int, typer.Option(min=1, help="How many.")] = 5,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with thumbnails too.")] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Show where each token ends.")] = False,
) -> None:
    """Show rows as the model will see them: what it learns to write, and each medium as its tokens."""
    from finetune.commands.data_preview import data_preview
    from finetune.commands.tables import print_previews

    print_previews(data_preview(recipe, set_ or [], rows=rows, split=split, html=html, boundaries=ids))


@app.command("split")
def data_split(
    path: Annotated[Path, typer.Argument(metavar="FILE|FOLDER", help="Rows.", show_default=False)],
    into: Annotated[Path, typer.Option(metavar="DIR", help="Where the files are written.")],
    train: Annotated[float, typer.Option(help="Share of the rows.")] = 0.8,
    validation: Annotated[float, typer.Option(help="Share of the rows.")] = 0.1,
    test: Annotated[float, typer.Option(help="Share of the rows.")] = 0.1,
    group: Annotated[str | None, typer.Option(metavar="COLUMN", help="Rows of a value stay together.")] = None,
    stratify: Annotated[str | None, typer.Option(metavar="COLUMN", help="Spread its values evenly.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed, another split.")] = 7,
    media: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Column that holds media, if not called image, audio or video."),
    ] = None,
    media_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the media; default: the file's.")
    ] = None,
    encoding: Annotated[str | None, typer.Option(help="Encoding of a table, such as gb18030.")] = None,
    sheet: Annotated[str | None, typer.Option(help="Sheet of an .xlsx; default: the first.")] = None,
) -> None:
    """Split rows into training, validation and test; no medium, and no group, ends up on two sides."""
    from finetune.data.check.split import SplitPlan, data_split

    plan = SplitPlan(train, validation, test, group, stratify, seed)
    result = data_split(path, into, plan, media=media or (), media_folder=media_folder, encoding=encoding, sheet=sheet)
    if not result.media:
        print("# no media found: if a column holds some, name it with --media COLUMN", file=sys.stderr)
    if empty := [split for split, share in plan.shares.items() if share and split not in result.files]:
        reason = f"{result.sets:,} sets of rows stay together, the largest has {result.largest:,} rows"
        print(f"# no rows for {', '.join(empty)}: {reason}", file=sys.stderr)
    print("data:")
    for split, file in result.files.items():
        print(f"  # {result.rows[split]:,} rows")
        print(f"  - {{path: {file}, media_folder: {result.media_folder}, split: {split}, task: ...}}")


@app.command("describe")
def data_describe(
    folder: Annotated[Path, typer.Argument(help="Pictures, recordings or videos.", show_default=False)],
    model: Annotated[
        str, typer.Option(metavar="RUN|FOLDER|URL", help="A model of ours, or an OpenAI-compatible endpoint.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The rows; continued if there. Default: FOLDER/described.jsonl.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="Whose columns the rows get: caption, transcribe, answer or vqa.")
    ] = "caption",
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="In place of the usual one.")] = None,
    questions: Annotated[
        int | None, typer.Option(min=1, help="Questions that the model writes and answers about each file.")
    ] = None,
    language: Annotated[str, typer.Option(metavar="NAME", help="Of what it writes: Chinese, German, ...")] = "",
    media: Annotated[
        str | None, typer.Option(metavar="KIND", help="image, audio or video, if there are several.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Files described at most.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Files processed at once.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer, in tokens.")] = 512,
    model_name: ModelName = None,
    key_variable: KeyVariable = "FINETUNE_API_KEY",
    retries: Annotated[int, typer.Option(min=0, help="Of a request that the URL is too busy for.")] = 5,
    max_pixels: Annotated[int, typer.Option(min=1, help="Larger pictures are scaled down for the URL.")] = 1_000_000,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Send so many pictures of a video to the URL, not the file.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over if the file exists.")] = False,
) -> None:
    """Write captions, transcripts, or questions with answers, for media. Exit status 1 where some have none."""
    from finetune.commands.data_describe import data_describe
    from finetune.commands.tables import print_descriptions
    from finetune.data.describe.options import DescribeOptions

    options = DescribeOptions(
        language=language,
        media=media,
        limit=limit,
        concurrency=concurrency,
        max_new_tokens=max_new_tokens,
        overwrite=overwrite,
        model_name=model_name,
        key_variable=key_variable,
        retries=retries,
        max_pixels=max_pixels,
        frames=frames,
    )
    result = data_describe(folder, model, out, task=task, prompt=prompt, questions=questions, options=options)
    print_descriptions(result)
    if result.errors:
        raise typer.Exit(1)


@app.command("label")
def data_label(
    rows: Annotated[Path, typer.Argument(metavar="RECIPE|FILE", help="Rows to label.", show_default=False)],
    run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A run, merged or adapter folder: it proposes.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The labels, continued if it is there; default: labels.csv, of described rows NAME-reviewed.jsonl.",
        ),
    ] = None,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="What the run was trained for.")] = None,
    labels: Annotated[str, typer.Option(metavar="A,B,...", help="The labels there are.")] = "",
    page: Annotated[bool, typer.Option("--page", help="Decide on a page, on this machine only.")] = False,
    port: Annotated[int, typer.Option(help="Port of the page.")] = 7860,
) -> None:
    """Label rows: a trained run proposes, you decide, in a CSV or on a page; or review rows of `data describe`."""
    from finetune.commands._asking import task_of
    from finetune.commands.data_label import data_label
    from finetune.model.trained_for import bindings_at, refuse_missing

    if run is not None:  # so that a mistake is reported before torch is imported
        refuse_missing(run)
        if bindings := bindings_at(run):
            task_of(bindings, task)
    names = [label.strip() for label in labels.split(",") if label.strip()]
    result = data_label(rows, run, out=out, task=task, labels=names, page_port=port if page else None)
    print(result)


@app.command("pairs")
def data_pairs(
    run: Run,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE|FOLDER", help="Rows to sample answers for; default: the run's training rows."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines of the pairs.")] = Path("pairs.jsonl"),
    by: Annotated[str, typer.Option(help="Who chooses: score, the task's own, or person.")] = "score",
    judge: Annotated[
        str | None,
        typer.Option(metavar="RUN|FOLDER|URL", help="Who chooses: a model of ours, or an OpenAI-compatible endpoint."),
    ] = None,
    answers: Annotated[int, typer.Option(min=2, help="Answers sampled to each question.")] = 4,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the softmax that tokens are drawn from.")] = 1.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Most rows to sample answers for; default: all.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer, in tokens.")] = 64,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="Which of several tasks.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests to the judge at once.")] = 4,
    model_name: ModelName = None,
    key_variable: KeyVariable = "FINETUNE_API_KEY",
    columns: Columns = None,
    media_folder: MediaFolder = None,
    encoding: Encoding = None,
) -> None:
    """Sample answers and pair the best with the worst, for objectives that learn from preferences. Exit status 1 where
    a judge gives no verdict on some.
    """
    from finetune.commands.data_pairs import PairOptions, data_pairs
    from finetune.commands.tables import print_pairs
    from finetune.data.describe.options import DescribeOptions

    if by not in ("score", "person"):
        raise RecipeError(f"--by {by}: write score or person")
    if data is None and (columns or media_folder or encoding):
        raise RecipeError("--columns, --media-folder and --encoding are about other rows: name them with --data")
    chooser: Literal["score", "person"] = "person" if by == "person" else "score"
    asking = DescribeOptions(concurrency=concurrency, model_name=model_name, key_variable=key_variable)
    options = PairOptions(
        answers, temperature, max_new_tokens, limit, chooser, media_folder, encoding, judge=judge, asking=asking
    )
    result = data_pairs(run, data, out=out, task=task, columns=columns_of(columns or []) or None, options=options)
    print_pairs(result)
    if result.errors:
        raise typer.Exit(1)
