from pathlib import Path
from types import ModuleType

import pytest
from pydantic import Field
from recipe_texts import GOOD

from finetune.common.errors import options_as_flags
from finetune.common.registry import PartOptions, load_part, part_names
from finetune.recipe import explain, parts


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A recipe's folder, as the current one so that messages show short names."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/products.csv").write_text("image,caption\n")
    (tmp_path / "data/more.csv").write_text("image,caption\n")
    (tmp_path / "x.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def as_on_the_command_line():
    with options_as_flags():
        yield


@pytest.fixture
def odd_parts(monkeypatch):
    """Parts that exercise what no real one does: an encoder `probe` with paths, a task `listen` about audio."""

    class Options(PartOptions):
        weights: Path = Field(description="a file", json_schema_extra={"path": "file"})
        cache: str | None = Field(None, description="a folder to come", json_schema_extra={"path": "new"})
        sizes: tuple[int, ...] = Field((1,), description="pixels")
        mode: int | list[int] = Field(1, description="a union")
        exact: bool = Field(False, description="a switch")

    class Listen(PartOptions):
        media: tuple[str, ...] = Field(("audio",), description="kinds of media")

    probe, listen = ModuleType("probe"), ModuleType("listen")
    probe.MEDIUM, probe.Options = "image", Options
    listen.Options, listen.HEADS = Listen, ("language",)
    odd = {("encoders", "probe"): probe, ("tasks", "listen"): listen}
    extra = dict(odd.keys())
    monkeypatch.setattr(parts, "load_part", lambda *where: odd.get(where) or load_part(*where))
    for module in (parts, explain):
        monkeypatch.setattr(module, "part_names", lambda f: (*part_names(f), *([extra[f]] if f in extra else [])))
