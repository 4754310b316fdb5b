"""The bounds that a server is started with."""

from pathlib import Path

import pytest

from finetune.common.errors import RecipeError
from finetune.serving.http.settings import Options, options_of


def test_options_are_read_and_named():
    options = options_of(["max_bytes=5", " hosts = a.example, *.b.example ", "origins="])
    assert options.max_bytes == 5 and options.hosts == ("a.example", "*.b.example") and options.origins == ()
    assert options_of([]) == Options()
    for given, said in (
        ("max_byte=5", "did you mean 'max_bytes'"),
        ("zzz=5", "there are max_request_bytes, "),
        ("max_bytes", "write key=value"),
        ("max_bytes=many", "max_bytes=many: input should be a valid integer"),
        ("max_bytes=0", "greater than or equal to 1"),
    ):
        with pytest.raises(RecipeError, match="--option") as caught:
            options_of([given])
        assert said in str(caught.value)
    assert all(field.description for field in Options.model_fields.values())


def test_the_documents_list_every_option():
    text = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    listed = [line.split(" | ") for line in text.splitlines() if line.startswith("| `") and line.count("|") == 4]
    found = {name.strip("|` "): (value.strip(), about.rstrip(" |")) for name, value, about in listed}
    for name, field in Options.model_fields.items():
        value = field.default
        shown = "" if value == () else f"{value:,}" if isinstance(value, int) else f"{value:g}"
        assert found[name] == (shown, field.description)
