"""The command line: parses, calls one function, prints. Each verb is a function of `finetune`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.commands import _data
from finetune.commands._interrupts import how_to_begin_again, how_to_go_on
from finetune.commands._options import (
    Columns,
    Encoding,
    MediaFolder,
    Overwrite,
    RecipeFile,
    Resume,
    Run,
    RunDir,
    Set,
    columns_of,
    strength_of,
)
from finetune.common.disk import FULL, UNUSABLE
from finetune.common.errors import DataError, FinetuneError, RecipeError, escaped, options_as_flags
from finetune.common.memory import RAISED, is_out_of_memory
from finetune.common.registry import FOLDERS, load_part, nearest, part_names
from finetune.common.run_folder import RunFolder
from finetune.common.version import VERSION
from finetune.recipe.words import shorten
from finetune.training.plan.cards import CARDS, DEFAULT

if TYPE_CHECKING:
    from finetune.commands.init import Question

OUT_OF_MEMORY = (
    "out of memory: close other programs, or take a smaller model.llm.name, model.llm.quantize: nf4, a smaller "
    "train.tokens_per_batch, train.encode_batch or evaluate.batch"
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fine-tune a frozen LLM with encoders for images, sound and video: train, merge, export, serve, publish.",
)

app.add_typer(_data.app, name="data")


def print_version(asked: bool) -> None:
    if asked:
        print(f"finetune {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE|FOLDER", help="Your rows.", show_default=False)],
    task: Annotated[str | None, typer.Option(help="classify, caption, transcribe, ...; default: by the rows.")] = None,
    answer: Annotated[str | None, typer.Option(metavar="COLUMN", help="The column of the answers.")] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The question to the model.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="A column put before the question; more than once: several."),
    ] = None,
    question: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The column of the questions, where each row has its own.")
    ] = None,
    group: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Rows with one value of it stay together: patient, user, ...")
    ] = None,
    encoding: Annotated[str | None, typer.Option(help="Encoding of a CSV or TSV file: gb18030, cp1252, ...")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    card: Annotated[
        str | None,
        typer.Option(
            help="cpu, 8gb, 12gb, 16gb, 24gb, a GPU such as t4 or rtx3060-12gb, or GB; default: this machine's."
        ),
    ] = None,
    language: Annotated[str | None, typer.Option(metavar="CODE", help="en, zh, ...; default: by the rows.")] = None,
    hold_out: Annotated[float | None, typer.Option(help="Share of the rows that is held out as test.")] = None,
    llm: Annotated[str | None, typer.Option(metavar="NAME", help="Another LLM: Hub id or folder.")] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(metavar="[MEDIUM=]NAME", help="Another encoder: Hub id or folder; may be repeated."),
    ] = None,
    media_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder that media paths are relative to.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The recipe; default: NAME.yaml.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a recipe that is there.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing: take the defaults.")] = False,
) -> None:
    """Write a recipe for a file or folder of your own rows; asks at most five questions."""
    from finetune.commands.init import Choices, write_recipe

    if not yes and not sys.stdin.isatty():
        raise RecipeError(
            "finetune init asks questions, and there is no terminal to ask on: add --yes for the defaults"
        )
    choices = Choices(
        task=task,
        answer=answer,
        prompt=prompt,
        text=text or (),
        question=question,
        group=group,
        encoding=encoding,
        name=name,
        card=card,
        language=language,
        hold_out=hold_out,
        llm=llm,
        encoders=encoder or (),
        media_folder=media_folder,
    )
    print(write_recipe(path, choices, (lambda question: question.default) if yes else ask, out, overwrite))


def ask(question: "Question") -> str:
    """Asks until the answer can be taken."""
    while True:
        text: str = typer.prompt(question.text, default=question.default)
        try:
            question.parse(text)
        except RecipeError as error:
            print(error, file=sys.stderr)
        else:
            return text


@app.command()
def check(recipe: RecipeFile, set_: Set = None) -> None:
    """Read a recipe and its rows, and say what is wrong with them."""
    from rich.console import Console

    from finetune.commands.check import check
    from finetune.training.plan.apart import LINE_SECONDS, planning

    with planning(recipe, set_ or []) as finish:  # it takes longer than the check
        checked = check(recipe, set_ or [])
        print(f"{recipe}: OK", checked, sep="\n", flush=True)
        with Console(stderr=True).status("plan"):
            figures = finish(LINE_SECONDS)
    if figures and figures["checkpoints_reason"]:
        print(f"  {figures['checkpoints_reason']}")
    print(f"  {figures['line'] if figures else f'memory, disk and hours: finetune plan {recipe}'}")


@app.command()
def plan(
    recipe: RecipeFile,
    set_: Set = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="CARD", help=f"One of {', '.join(CARDS)}; default: this machine's, or {DEFAULT}."),
    ] = None,
    rent: Annotated[
        float | None, typer.Option(min=0, help="Rent of the card, in US$ an hour; default: the table's.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what a run takes, before weights are downloaded: memory, disk, hours. Exit status 1: tight, 2: too large."""
    from finetune.commands.plan import plan
    from finetune.commands.tables import print_plan

    try:
        result = plan(recipe, set_ or [], gpu, rent)
    except FinetuneError as error:
        error.exit_status = max(2, error.exit_status)  # 1 says that the card is tight
        raise
    if json_:
        print(json.dumps(result.as_json(), indent=2, ensure_ascii=False))
    else:
        print_plan(result)
    raise typer.Exit(result.exit_status)


@app.command()
def train(
    recipe: RecipeFile, set_: Set = None, run: RunDir = None, resume: Resume = False, overwrite: Overwrite = False
) -> None:
    """Train the stages of a recipe; writes RUN/adapter."""
    from finetune.recipe.load import load_recipe, refuse_missing_packages

    loaded = load_recipe(recipe, set_ or [])  # so that a mistake is reported before torch is imported
    refuse_missing_packages(loaded)
    folder = RunFolder(run or Path("runs") / loaded.name)
    folder.refuse_taken(resume, overwrite)
    with how_to_go_on("train", recipe, set_ or [], folder):
        from finetune.training.train import train

        train(loaded, run, resume, overwrite)


@app.command()
def evaluate(
    run: Run,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE|FOLDER", help="Score these rows, not those of the recipe.")
    ] = None,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="Which of several tasks they are for.")] = None,
    columns: Columns = None,
    media_folder: MediaFolder = None,
    encoding: Encoding = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the scores; default: RUN/evaluations/NAME of the file."),
    ] = None,
) -> None:
    """Score a run on held-out rows: trained, untrained, with blank and with shuffled media."""
    from finetune.data.new_files import RowsAs
    from finetune.evaluation.new_rows import refuse_unusable, refuse_without_rows

    if data is None:
        refuse_without_rows(task, columns, media_folder, encoding, out)
    renamed = columns_of(columns or []) or None
    folder = RunFolder.open(run, needs="adapter")  # so that a mistake is reported before torch is imported
    if data:
        refuse_unusable(folder, data, task, RowsAs(renamed, media_folder, encoding))
    with how_to_begin_again("scores are written when all rows have been answered", folder):
        from finetune.commands.tables import print_scores
        from finetune.evaluation.evaluate import evaluate

        result = evaluate(run, data, task=task, columns=renamed, media_folder=media_folder, encoding=encoding, out=out)
    print_scores(result)
    if count := result.metrics.data.trained_on:
        print(f"{count:,} of these rows are also training rows: scores on them say little about new ones")
    if data:
        print(result.written.path)


@app.command()
def report(
    run: Run,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to; default: RUN/report.html.")] = None,
) -> None:
    """Write one offline HTML page about a run: recipe, scores, examples, cost."""
    from finetune.evaluation.report.report import report

    print(report(run, out))


@app.command()
def merge(run: Run) -> None:
    """Merge the adapter into the LLM, compare it with what was trained, and write RUN/merged with a certificate."""
    folder = RunFolder.open(run, needs="adapter")
    with how_to_begin_again(f"{folder.merged} is replaced only by a whole one", folder):
        from finetune.merging.merge import merge

        merge(run)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN|FOLDER", help="A run, or a merged folder.")],
    to: Annotated[str, typer.Option(metavar="TARGET", help=f"One of {', '.join(part_names('export'))}.")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to, new; default: RUN/exports/TARGET.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Option of the target: `finetune schema export.TARGET`; may be repeated."
        ),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Load it in the target, in a clean process, and compare tokens.")] = True,
) -> None:
    """Write the merged model as another engine loads it, and compare what that engine answers with ours."""
    from finetune.export._target import read_target

    read_target(source, to, out, option or [])  # so that a mistake is reported before torch is imported
    from finetune.commands.tables import print_export
    from finetune.export._run import export_run

    with how_to_begin_again("its folder appears only when it is whole"):
        exported = export_run(source, to, out, option or [], verify=verify)
    print_export(exported)


@app.command()
def serve(
    models: Annotated[
        list[str], typer.Argument(metavar="[NAME=]RUN|FOLDER|HUB_ID...", help="What is served, and under which name.")
    ],
    host: Annotated[str, typer.Option(help="Address; any but 127.0.0.1 needs an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0: any free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="FINETUNE_API_KEY", help="What clients must send as their bearer token.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A bound or size: `finetune schema serve` lists them; may be repeated."),
    ] = None,
) -> None:
    """Serve models over HTTP, as OpenAI's API, with a chat page at /."""
    from finetune.serving.serve import serve

    serve(models, host=host, port=port, api_key=api_key, options=option or [])


@app.command()
def push(
    run: Run,
    repo: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="On the Hub: name, or user/name; default: the recipe's publish.repo."),
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="The merged model, not the adapter.")] = False,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Visibility of a new repository; default: the recipe's. --private refuses one that is public.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and write the card, upload nothing.")] = False,
) -> None:
    """Publish on the Hub, with a card; then download into an empty cache, load, and compare answers."""
    from finetune.commands.tables import print_push
    from finetune.publishing.push import push

    print_push(push(run, repo, merged=merged, private=private, dry_run=dry_run))


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="On the Hub.")],
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to; default: the name's last part.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
) -> None:
    """Download a published model into a folder, and check that its files are whole."""
    from finetune.publishing.pull import pull

    print(pull(repo, to, revision=revision).path)


@app.command()
def chat(
    folder: Annotated[Path, typer.Argument(metavar="RUN|FOLDER", help="A run, merged or adapter folder.")],
    prompt: Annotated[str | None, typer.Argument(help="One question; without it, a conversation.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture that the question is about; may be repeated.")
    ] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="A recording; may be repeated.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A video; may be repeated.")] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Answer as trained under this name: by its labels, or a number."),
    ] = None,
    strength: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X|MEDIUM=X", help="Factor of what media add (cross-attention only); 0: the text-only LLM."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer, in tokens.")] = 256,
) -> None:
    """Ask a trained model."""
    from finetune.model.trained_for import bindings_at, refuse_missing
    from finetune.recipe.schema import chosen_task

    weigh = strength_of(strength or [])
    refuse_missing(folder)  # so that a mistake is reported before torch is imported
    if task is not None and (bindings := bindings_at(folder)):
        chosen_task([*bindings], task)
    for kind, paths in {"image": image, "audio": audio, "video": video}.items():
        for path in paths or ():
            if not path.is_file():
                raise DataError(f"--{kind} {path}: no such file")
    from finetune.commands.chat import chat

    answer = chat(folder, prompt, image, audio, video, task=task, strength=weigh, max_new_tokens=max_new_tokens)
    if prompt is not None:
        print(escaped(answer))


@app.command()
def predict(
    run: Annotated[str, typer.Argument(metavar="RUN|FOLDER", help="A run, merged or adapter folder.")],
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="FILE|FOLDER|TABLE...", help="Media, folders of them, or rows without answers."),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help=".csv or .jsonl of the answers; continued if unfinished.")
    ] = Path("answers.csv"),
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="One of several tasks that the model was trained for.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="In place of the task's question.")] = None,
    columns: Columns = None,
    media_folder: MediaFolder = None,
    encoding: Encoding = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows asked at once.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer, in tokens.")] = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over if the file exists.")] = False,
) -> None:
    """Answer new files or rows with a trained model. Exit status 1 where some have no answer."""
    from finetune.commands.predict import PredictOptions, predict

    options = PredictOptions(batch, max_new_tokens, media_folder, overwrite, encoding)
    renamed = columns_of(columns or []) or None
    result = predict(run, inputs, out, task=task, prompt=prompt, columns=renamed, options=options)
    from finetune.commands.tables import print_predictions

    print_predictions(result)
    if result.errors:
        raise typer.Exit(1)


@app.command()
def run(
    recipe: RecipeFile, set_: Set = None, run: RunDir = None, resume: Resume = False, overwrite: Overwrite = False
) -> None:
    """The whole way: check, train, evaluate, merge, one question about a held-out row, and the report."""
    from finetune.commands.run import run as run_all
    from finetune.commands.tables import print_run, print_scores
    from finetune.recipe.load import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    with how_to_go_on("run", recipe, set_ or [], RunFolder(run or Path("runs") / loaded.name)):
        result = run_all(loaded, (), run, resume, overwrite, print_scores)
    print_run(result)


@app.command()
def sweep(
    recipe: RecipeFile,
    over: Annotated[
        list[str],
        typer.Option(metavar="KEY=V1,V2", help="Values of a key, or with --trials a range LOW..HIGH; may be repeated."),
    ],
    trials: Annotated[
        int | None, typer.Option(min=1, help="Trials that optuna chooses; without it, every combination.")
    ] = None,
    set_: Set = None,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="DIR", help="Its folder; default: runs/NAME-sweep.")
    ] = None,
) -> None:
    """Train a recipe with other values of some keys, and compare on its validation rows; called again, it goes on."""
    from finetune.commands.tables import print_trials
    from finetune.training.sweep_choices import read_choices

    read_choices(recipe, over, trials, set_ or [])  # so that a mistake is reported before torch is imported
    from finetune.training.sweep import sweep

    with how_to_begin_again("trials that are done are kept, and the command goes on with the others"):
        result = sweep(recipe, over, trials, set_ or [], run)
    print_trials(result)


@app.command()
def recipes(
    copy: Annotated[str | None, typer.Option(metavar="NAME", help="Copy this recipe.")] = None,
    to: Annotated[Path, typer.Option(metavar="DIR", help="Where to.")] = Path(),
) -> None:
    """List the recipes that come with the package, or copy one."""
    from finetune.commands.recipes import commands_for_files, recipes

    listed = recipes(copy, to)
    if copy is not None:
        print(f"{to / copy}.yaml: name your own data and weights in it; its paths are relative to its new place.")
        print(
            "The rows that it names now are in the repository, under recipes/data. These commands make and fetch them:"
        )
        print(*(f"  {command}" for command in commands_for_files(copy, to)), sep="\n")
        return
    print(listed)


@app.command()
def doctor(
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Examine this environment: versions, device, memory, disks, the Hub. Exit status 1 where there are errors."""
    from finetune.commands.doctor import doctor

    diagnosis = doctor()
    print(json.dumps(asdict(diagnosis), indent=2) if json_ else diagnosis)
    if not diagnosis.healthy:
        raise typer.Exit(1)


@app.command()
def schema(
    part: Annotated[
        str | None,
        typer.Argument(
            metavar="[FOLDER.PART|SECTION|serve]",
            help="Only options: of a part, tasks.rank; of a section, merge; or of the server.",
        ),
    ] = None,
) -> None:
    """Print the JSON schema of recipes, for editors; or the options of one part, to read."""
    from finetune.recipe.load import Recipe
    from finetune.recipe.schema import schema

    if part is not None:
        folder, _, name = part.rpartition(".")
        section: Any = Recipe.model_fields.get(part)
        if section is not None and hasattr(section.annotation, "model_fields"):
            options: Any = section.annotation
        elif part == "serve":
            from finetune.serving.http import settings

            options = settings.ServerOptions
        elif folder not in FOLDERS:
            near = nearest(part, [f"{one}.{name}" for one in FOLDERS for name in part_names(one)])
            advice = f"did you mean {near!r}? Otherwise write" if near else "write"
            raise RecipeError(
                f"{part}: {advice} 'serve', a section of recipes as 'merge', or one of {', '.join(FOLDERS)}, a dot, "
                "and a part"
            )
        else:
            options = load_part(folder, name).Options
        for option, field in options.model_fields.items():
            needed = "needed" if field.is_required() else f"default {field.default!r}"
            print(f"{option}: {field.description} ({needed})")
        return
    print(json.dumps(schema(), indent=2, ensure_ascii=False))


def main() -> None:
    try:
        with options_as_flags():
            app()
    except FinetuneError as error:
        print(escaped(str(error)), file=sys.stderr)
        sys.exit(error.exit_status)
    except RAISED as error:
        if is_out_of_memory(error):  # training, evaluating and merging say more
            print(OUT_OF_MEMORY, file=sys.stderr)
            sys.exit(1)
        if not isinstance(error, OSError):
            raise
        if error.errno in FULL:
            print(f"{error.filename or 'writing'}: {error.strerror}: make room, and try again", file=sys.stderr)
            sys.exit(1)
        if error.errno not in UNUSABLE or not error.filename:
            raise
        print(f"{shorten(error.filename, 300)}: {error.strerror}: name another file or folder", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except SystemExit as end:
        if end.code == 130:  # typer after Ctrl-C, without a word
            print("stopped", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
