"""The recipes that come with the package."""

import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from finetune.common import display
from finetune.common.errors import RecipeError, option

# Tables under recipes/data whose rows name media of other folders there, or are made from their pictures.
MADE_FROM = {
    "clips": ("emoji",),
    "tickets": ("emoji", "calls"),
    "recommend": ("emoji",),
    "m6": ("emoji",),
    "support-calls": ("calls",),
}
DOWNLOADED = ("emoji", "sentiment")  # their scripts fetch a font, and keep the archive


def recipes_folder() -> Path:
    """Beside the package in a checkout, inside it when installed."""
    inside = Path(__file__).parents[1] / "_recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


@dataclass(frozen=True, repr=False)
class RecipeList:
    """`comments`: {name: first comment line}; `copied`: the copy, where one was made."""

    comments: dict[str, str]
    copied: Path | None = None

    def __repr__(self) -> str:
        return "\n".join(f"{name:<24} {comment}" for name, comment in self.comments.items())

    def _repr_html_(self) -> str:
        return display.table(("recipe", "learns"), list(self.comments.items()), left=True)


def recipes(copy: str | None = None, to: Path | str = ".") -> RecipeList:
    """The recipes that come with the package; with `copy`, that one is copied into the folder `to`, with its chat
    template. Raises RecipeError.
    """
    target = None
    paths = {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}
    if copy is not None:
        if copy not in paths:
            raise RecipeError(f"no recipe is called {copy!r}. There are: {', '.join(paths)}")
        target = Path(to) / paths[copy].name
        if target.exists():
            raise RecipeError(f"{target} exists already; choose another folder with {option('--to', 'to=')}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(paths[copy], target)
        for name in re.findall(r"^ *chat_template: (\S+)", target.read_text(encoding="utf-8"), re.MULTILINE):
            (target.parent / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(paths[copy].parent / name, target.parent / name)
    first = {name: path.read_text(encoding="utf-8").partition("\n")[0] for name, path in paths.items()}
    return RecipeList({name: line.lstrip("# ").strip() for name, line in first.items()}, target)


def commands_for_files(name: str, to: Path | str = ".") -> list[str]:
    """Commands that put the weights and rows which an offline recipe names where its copy in `to` looks for them.

    The rows are drawn or synthesised by scripts; an installed package carries the scripts and not the rows.
    """
    text = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    scripts, data = recipes_folder() / "offline", Path(to) / "data"
    weights_folder = os.path.normpath(Path(to) / ".." / "weights")
    commands = []
    if weights := sorted(set(re.findall(r"name: \.\./weights/([\w-]+)", text))):
        names = [folder.replace("-", "_") for folder in weights]
        commands.append(["python", f"{scripts / 'fetch.py'}", *names, "--into", weights_folder])
    folders: dict[str, None] = {}  # ordered: what others are made from comes first
    for folder in re.findall(r"path: data/([\w-]+)/", text):
        folders |= dict.fromkeys((*MADE_FROM.get(folder, ()), folder))
    for folder in folders:
        script = scripts / f"make_{folder.replace('-', '_')}.py"
        command = ["python", f"{script}", "--into", f"{data / folder}"]
        if folder in MADE_FROM:
            command += ["--data", f"{data}"]
        if folder in DOWNLOADED:
            command += ["--packages", f"{weights_folder}/.packages"]
        commands.append(command)
    return [shlex.join(command) for command in commands]
