"""The recipes that come with the package."""

import shutil
from pathlib import Path

from finetune.common.errors import RecipeError


def recipes_folder() -> Path:
    """Beside the package in a checkout, inside it when installed."""
    inside = Path(__file__).parents[1] / "_recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def recipes(copy: str | None = None, to: Path | str = ".") -> dict[str, str]:
    """{name: its first comment line}; with `copy`, that recipe is copied into the folder `to`. Raises RecipeError."""
    found = {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}
    if copy is not None:
        if copy not in found:
            raise RecipeError(f"no recipe is called {copy!r}. There are: {', '.join(found)}")
        target = Path(to) / found[copy].name
        if target.exists():
            raise RecipeError(f"{target} exists already; choose another folder with --to")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found[copy], target)
    return {name: _first_comment(path) for name, path in found.items()}


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()
