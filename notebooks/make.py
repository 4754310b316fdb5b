"""Write the notebooks from notebooks/sources: `python notebooks/make.py`.

A source is a Python file of cells. `# %% [markdown] en` begins text of one language, `# %%` code, `# %% include NAME`
takes the cells of common.py that are called so (there `# %% name NAME`). A line of code that ends in `#:en` or `#:zh`
belongs to one language. `{REPOSITORY}` is OWNER/NAME on GitHub, from `project.urls` of pyproject.toml.
"""

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LANGUAGES = {"en": ".ipynb", "zh": ".zh.ipynb"}
HERE = Path(__file__).parent
PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
SOURCES = HERE / "sources"
COMMON = SOURCES / "common.py"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
OPEN = {"en": "Open in Colab", "zh": "在 Colab 中打开"}
CHINESE = "[\u2018-\u201d\u3000-\u9fff\uff00-\uffef]"
OTHER = {"en": ("zh", "中文"), "zh": ("en", "English")}
METADATA = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "provenance": []},
    "kernelspec": {"display_name": "Python 3", "name": "python3"},
    "language_info": {"name": "python"},
}


@dataclass(frozen=True)
class Cell:
    """`kind`: markdown or code; `language`: None for both; `name`: of a cell of common.py."""

    kind: str
    text: str
    language: str | None = None
    name: str = ""


def cells_of(path: Path) -> list[Cell]:
    """Raises ValueError for a heading of a cell that isn't known."""
    cells = []
    parts = re.split(r"^# %%(.*)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        words = heading.split()
        if words[:1] == ["include"]:
            cells += [cell for cell in cells_of(COMMON) if cell.name == words[1]]
            continue
        name = words.pop(words.index("name") + 1) if "name" in words else ""
        kind = "markdown" if "[markdown]" in words else "code"
        language = next((word for word in words if word in LANGUAGES), None)
        if unknown := {*words} - {"[markdown]", "name", *LANGUAGES}:
            raise ValueError(f"{path}: '# %%{heading}': unknown {sorted(unknown)}")
        text = body.strip("\n")
        if kind == "markdown":
            text = re.sub("^# ?", "", text, flags=re.MULTILINE)
            text = re.sub(f"(?<={CHINESE})\n(?={CHINESE})", "", text)  # a line break would be shown as a space
        cells.append(Cell(kind, text, language, name))
    return cells


def in_language(code: str, language: str) -> str:
    """The code without the other language's lines."""
    lines = []
    for line in code.splitlines():
        text, marker, found = line.rpartition("  #:")
        if not marker:
            lines.append(line)
        elif found == language:
            lines.append(text)
    return "\n".join(lines)


def notebook(name: str, language: str) -> dict[str, Any]:
    """In nbformat 4.5, without outputs."""
    written = []
    for cell in cells_of(SOURCES / f"{name}.py"):
        if cell.language not in (None, language):
            continue
        text = in_language(cell.text, language) if cell.kind == "code" else cell.text
        text = text.replace("{REPOSITORY}", REPOSITORY)
        if not written:
            text = with_badge(text, name, language)
        entry: dict[str, Any] = {"cell_type": cell.kind, "id": f"{name}-{len(written)}", "metadata": {}}
        if cell.kind == "code":
            entry |= {"execution_count": None, "outputs": []}
            if "# @title" in text:
                entry["metadata"] = {"cellView": "form"} if "# @param" in text else {}
        written.append(entry | {"source": text.splitlines(keepends=True)})
    return {"cells": written, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}


def with_badge(text: str, name: str, language: str) -> str:
    """The title, and below it what opens the notebook in Colab, and its twin."""
    title, _, rest = text.partition("\n")
    here = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{name}{LANGUAGES[language]}"
    other, label = OTHER[language]
    links = f"[![{OPEN[language]}]({BADGE})]({here}) · [{label}]({name}{LANGUAGES[other]})"
    return f"{title}\n\n{links}\n{rest}"


def names() -> list[str]:
    return sorted(path.stem for path in SOURCES.glob("*.py") if path != COMMON)


def notebooks() -> dict[Path, str]:
    """{file: what it must hold}."""
    files = {}
    for name in names():
        for language, suffix in LANGUAGES.items():
            content = json.dumps(notebook(name, language), ensure_ascii=False, indent=1) + "\n"
            files[HERE / f"{name}{suffix}"] = content
    return files


if __name__ == "__main__":
    if "OWNER" in REPOSITORY:
        print("pyproject.toml: project.urls has a placeholder: these notebooks find no repository to clone")
    for path, content in notebooks().items():
        path.write_text(content, encoding="utf-8")
