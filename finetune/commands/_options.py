"""Options and arguments that several commands share, and how their values are read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from finetune.common.errors import RecipeError

RecipeFile = Annotated[Path, typer.Argument(help="A recipe, a YAML file.", show_default=False)]
Run = Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key, by its full dotted name; may be repeated."),
]
RunDir = Annotated[Path | None, typer.Option("--run", metavar="DIR", help="Run folder; default: runs/NAME.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove the run in the folder, and start over.")]
Columns = Annotated[
    list[str] | None,
    typer.Option(metavar="OURS=THEIRS", help="The task's column and the file's, as image=photo; may be repeated."),
]
Encoding = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of tables, as gb18030; default: the recipe's, or detected.")
]
MediaFolder = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of the media that rows name; default: that of the rows.")
]

ModelName = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of the model at the URL; default: the only one there.")
]
KeyVariable = Annotated[str, typer.Option(metavar="NAME", help="Environment variable with the key of the URL.")]


def strength_of(given: list[str]) -> float | dict[str, float] | None:
    """'0.5', or 'image=0.5' any number of times."""
    try:
        if len(given) == 1 and "=" not in given[0]:
            return float(given[0])
        return {name: float(value) for name, value in (one.split("=") for one in given)} or None
    except ValueError:
        raise RecipeError(f"--strength {' '.join(given)}: write a number, or image=0.5 for one medium") from None


def columns_of(given: Sequence[str]) -> dict[str, str]:
    """'image=photo', any number of times."""
    pairs = [one.partition("=") for one in given]
    for one, (ours, equals, theirs) in zip(given, pairs, strict=True):
        if not (ours and equals and theirs):
            raise RecipeError(f"--columns {one}: write the task's column, = and the file's, as image=photo")
    return {ours: theirs for ours, _, theirs in pairs}
