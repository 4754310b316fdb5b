import math
import subprocess
import sys

import pytest
import yaml

from finetune.common.errors import RecipeError
from finetune.recipe.words import MAX_DEPTH
from finetune.recipe.yaml_reader import dump_yaml, read_yaml


def value_of(text):
    return read_yaml(f"key: {text}", "x.yaml").value["key"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1.0e-3", 1e-3),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("+3", 3),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("007", "007"),
        ("0o17", "0o17"),
        ("0x1f", "0x1f"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("190:20:30", "190:20:30"),
        ("2024-01-01", "2024-01-01"),
        (".inf", ".inf"),
        (".nan", ".nan"),
        ("'7'", "7"),
        ('"true"', "true"),
        ("e5", "e5"),
        ("|\n  12", "12"),
        ("{a: [1, two]}", {"a": [1, "two"]}),
        ("=", "="),
        ("é 漢 🙂", "é 漢 🙂"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    got = value_of(text)
    assert got == value
    assert type(got) is type(value)


def test_keys_are_text_and_merge_keys_are_only_keys():
    assert read_yaml("{1: a, no: b, null: c, '<<': {d: 1}}", "x").value == {
        "1": "a",
        "no": "b",
        "null": "c",
        "<<": {"d": 1},
    }


def test_every_key_and_entry_has_its_line():
    document = read_yaml("# comment\na: 1\nb:\n  - c: 2\n    d:\n      e\n  - f\n", "x.yaml")
    lines = {location: place.line for location, place in document.places.items()}
    assert lines == {
        (): 1,
        ("a",): 2,
        ("b",): 3,
        ("b", 0): 4,
        ("b", 0, "c"): 4,
        ("b", 0, "d"): 5,
        ("b", 1): 7,
    }
    assert document.place(("b", 0, "not written")).text == "x.yaml:4"


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a: written twice, first in line 1"),
        ("a:\n  b: 1\n  'b': 2\n", 3, "a.b: written twice"),
        ("a: &x 1\n", 1, "anchors and aliases"),
        ("a: 1\nb: *x\n", 2, "anchors and aliases"),
        ("a:\n  - &x [1]\n", 2, "anchors and aliases"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", 2, "tags (tag:yaml.org,2002"),
        ("a: !!str 1\n", 1, "tags"),
        ("a: ! 1\n", 1, "tags"),
        ("--- !mine\na: 1\n", 1, "tags"),
        ("a: 1\n---\nb: 2\n", 2, "single document"),
        ("a: [1\nb: 2\n", 2, "invalid YAML"),
        ("a: {b: Which?}\n", 1, "quote"),
        ("a: 'open\n", 2, "invalid YAML"),
        ("a: 1\n\tb: 2\n", 2, "a tab can't indent"),
        ("a: b: c\n", 1, "mapping values are not allowed here"),
        ("a: 1\n  b: 2\n", 2, "invalid YAML"),
        ("a: @x\n", 1, "invalid YAML"),
        ('a: "\\q"\n', 1, "invalid YAML"),
        ('a: 1\nb: "\\UFFFFFFFF"\n', 2, "escape"),
        ('a: "\\ud800"\n', 1, "surrogate"),
        ('a: "\\0"\n', 1, "NUL"),
        ("a: 1\nb: \x07\n", 2, "control character"),
        (f"a: {'9' * 19}\n", 1, "more than 18 digits"),
        ("a: 1e999\n", 1, "too large"),
        ("? [a, b]\n: 1\n", 1, "a key is text"),
        ("? {a: b}\n: 1\n", 1, "a key is text"),
        (f"a: {'[' * 50}{']' * 50}\n", 1, f"nested deeper than {MAX_DEPTH}"),
        ("a: " + "{b: " * 5000, 1, "nested deeper"),
        ("%YAML " + "1" * 5000 + ".1\n---\na: 1\n", 1, "invalid YAML"),
    ],
)
def test_what_is_not_plain_yaml_is_refused_with_its_line(text, line, reason):
    with pytest.raises(RecipeError) as caught:
        read_yaml(text, "x.yaml")
    message = str(caught.value)
    assert message.startswith(f"x.yaml:{line}: ")
    assert reason in message
    assert len(message) < 300
    assert "\n" not in message


def test_an_alias_bomb_is_refused_before_it_grows():
    """In a process that may use 10 s and 1 GiB: a reader that expands it can't take the machine with it."""
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    script = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (10, 10))\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "from finetune.recipe.yaml_reader import read_yaml\n"
        "read_yaml(sys.stdin.read(), 'x')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], input=bomb, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "RecipeError: x:1: anchors" in done.stderr


def test_empty_text_is_none():
    for text in ("", "# nothing\n", "---\n"):
        assert read_yaml(text, "x").value is None


def test_whatever_is_dumped_is_read_back_equal_here_and_by_others():
    texts = [
        "no",
        "2e-4",
        "1e5",
        "007",
        "1_0",
        "1:30",
        "2024-01-01",
        "",
        "~",
        "null",
        " a ",
        "a: b",
        "#",
        "*",
        "&x",
        "!",
    ]
    texts += [
        "é🙂",
        "two\nlines\n",
        "\x85",
        "a\u2028b\r\n",
        "tab\t",
        "'",
        '"',
        "true",
        "0x1f",
        "=",
        "<<",
        ".inf",
        "-",
        "?",
        "x" * 300,
    ]
    shared = [1.0, 2e-5, 1e22, -0.5, 7, True, None]
    value = {
        "texts": texts,
        "keys": {text: text for text in texts},
        "numbers": shared,
        "again": shared,
        "empty": [{}, []],
    }
    written = dump_yaml(value)
    assert read_yaml(written, "x").value == value
    assert yaml.safe_load(written) == value
    assert "&" not in written.replace("'&x'", "")


def test_numbers_never_become_infinite_or_not_a_number():
    for text in (".inf", "-.inf", ".NaN", "inf", "nan"):
        assert not isinstance(value_of(text), float) or math.isfinite(value_of(text))
