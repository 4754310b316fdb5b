"""The options of a server."""

from pathlib import Path

import pytest

from finetune.common.errors import RecipeError
from finetune.common.registry import parse_options
from finetune.recipe.schema import Limits
from finetune.serving.engine.contract import Busy, EngineLimits
from finetune.serving.http.settings import ServerOptions
from finetune.serving.serve import load_engine


def test_options_are_parsed_and_validated():
    options = parse_options(["max_bytes=5", " hosts = a.example, *.b.example ", "origins="], ServerOptions)
    assert options.max_bytes == 5 and options.hosts == ("a.example", "*.b.example") and options.origins == ()
    assert parse_options([], ServerOptions) == ServerOptions()
    for pair, message in (
        ("max_byte=5", "did you mean 'max_bytes'"),
        ("zzz=5", "there are: max_batch, "),
        ("max_bytes", "write KEY=VALUE"),
        ("max_bytes=many", "max_bytes=many: Input should be a valid integer"),
        ("max_bytes=0", "greater than or equal to 1"),
        ("max_stops=10001", "less than or equal to 10000"),
    ):
        with pytest.raises(RecipeError, match="options:") as caught:
            parse_options([pair], ServerOptions)
        assert message in str(caught.value)


def test_limits_reach_the_engine_and_its_models():
    assert EngineLimits(**ServerOptions().model_dump(include=set(EngineLimits.model_fields))) == EngineLimits()
    options = ServerOptions(max_batch=3, queue_limit=0)
    engine = load_engine({}, options)
    assert engine.limits is options
    with pytest.raises(Busy):
        engine._worker.accept(object())
    tighter = ServerOptions(max_pixels=5).media_limits(Limits(max_bytes=7))
    assert (tighter.max_bytes, tighter.max_pixels) == (7, 5)


def test_the_documents_list_every_option():
    text = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    section = text.partition("## Options")[2].partition("\n## ")[0]
    lines = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    rows = {name.strip("|` "): (value.strip(), about.rstrip(" |")) for name, value, about in lines}
    for name, field in ServerOptions.model_fields.items():
        value = field.default
        shown = "" if value == () else f"{value:,}" if isinstance(value, int) else f"{value:g}"
        assert rows[name] == (shown, field.description)
