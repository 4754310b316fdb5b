import math
import subprocess
import sys

import pytest
import yaml

from finetune.common.errors import RecipeError
from finetune.recipe.words import MAX_DEPTH
from finetune.recipe.yaml_reader import MAX_BYTES, dump_yaml, near_file, read_text, read_yaml


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
    assert "RecipeError: x:1: a0: anchors" in done.stderr


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


def message_of(read, *arguments, **options) -> str:
    with pytest.raises(RecipeError) as caught:
        read(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\n\tb: 2\n", "x:2: a tab can't indent; use spaces."),
        ("a: 1\nb: \x07\n", "x:2: a control character, '\\x07'; remove it."),
        ("\n? {a: b}\n: 1\n", "x:2: a list or mapping used as a key; a key is text."),
        ("b: {c: 1,\n c: 2}", "x:2: b.c: written twice, first in line 1."),
        (f"\na: {'1' * 19}\n", "x:2: a: a number of more than 18 digits; quote it if it is text."),
        ("\na: -1e999\n", "x:2: a: -1e999 is too large for a number; quote it if it is text."),
        ("\na: !!str 1\n", "x:2: a: tags (tag:yaml.org,2002:str) aren't supported; remove it."),
        ("\na: *b\n", "x:2: a: anchors and aliases (& and *) aren't supported; write the value out."),
        ('\na: "\\0"\n', "x:2: a: text with a NUL or half a surrogate pair."),
        ('a: 1\nb: "\\UFFFFFFFF"\n', "x:2: invalid YAML: an escape or directive that can't be read."),
        ("a: b: c\n", "x:1: invalid YAML: mapping values are not allowed here."),
    ],
)
def test_a_refusal_says_what_to_write_instead(text, message):
    assert message_of(read_yaml, text, "x") == message


def test_a_mistake_in_a_flow_collection_tells_what_to_quote():
    advice = "; inside { } or [ ], quote text that has ? : , or #."
    for text in ("a: {b: Which?}\n", "a: [1\nb: 2\n"):
        assert message_of(read_yaml, text, "x").endswith(advice)
    assert advice not in message_of(read_yaml, "a: 'open\n", "x")


def test_an_option_has_no_lines():
    assert message_of(read_yaml, "a: 1\na: 2", "--set x", numbered=False).startswith("--set x: a: written twice")
    document = read_yaml("a: 1", "--set x", numbered=False)
    assert document.place(("a",)) == (0, "--set x")
    assert read_yaml("\na: 1", "x").place(("a",)) == (2, "x:2")


def test_the_limits_themselves_are_allowed():
    assert value_of("9" * 18) == 10**18 - 1
    value = read_yaml("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "x").value
    depth = 0
    while value:
        value, depth = value[0], depth + 1
    assert depth == MAX_DEPTH
    assert f"nested deeper than {MAX_DEPTH} levels" in message_of(read_yaml, "[" * (MAX_DEPTH + 2), "x")
    assert read_yaml("[[[]], [[]], [[]]]", "x").value == [[[]], [[]], [[]]]  # siblings add no depth
    wide = "\n".join(f"k{number}: [[[{number}]]]" for number in range(3 * MAX_DEPTH))
    assert len(read_yaml(wide, "x").value) == 3 * MAX_DEPTH


def test_a_file_of_one_mebibyte_is_read_and_no_larger_one(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"#" * MAX_BYTES)
    assert read_text(path) == "#" * MAX_BYTES
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    assert message_of(read_text, path) == f"{path}: larger than 1 MiB; is it a recipe?"


def test_a_file_that_cannot_be_read_says_why(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"a: 1\n\nb: \xff\n")
    assert message_of(read_text, path) == f"{path}:3: not UTF-8; save the file as UTF-8."
    assert message_of(read_text, tmp_path) == f"{tmp_path}: a folder; name the recipe's file in it."
    assert message_of(read_text, "评论.XLSX") == (
        "评论.XLSX: rows, not a recipe; `finetune init FILE` writes a recipe for them."
    )
    near = message_of(read_text, tmp_path / "x.yml")
    assert near == f"{tmp_path / 'x.yml'}: no such file. Did you mean 'x.yaml'?"
    assert message_of(read_text, path / "y").endswith("x.yaml/y: can't be read: Not a directory.")
    assert "can't be read: embedded null byte" in message_of(read_text, "a\0b")
    path.write_bytes(b"\xef\xbb\xbfa: \xc3\xa9")
    assert read_text(str(path)) == "a: é"


def test_another_file_of_a_folder_is_suggested_by_its_spelling(tmp_path, monkeypatch):
    (tmp_path / "products.csv").touch()
    (tmp_path / "s3.csv").touch()
    monkeypatch.chdir(tmp_path)
    suggestion = " Did you mean 'products.csv'?"
    for path in ("product.csv", str(tmp_path / "Products.CSV")):
        assert near_file(path) == suggestion
    for path in ("nothing", "products.csv", "nosuch.csv", "no/such/product.csv", "a\0/product.csv"):
        assert near_file(path) == ""


def test_what_is_dumped_is_easy_to_read():
    text = dump_yaml({"b": "é 漢", "a": [1, {"c": None}], "long": "word " * 22 + "end"})
    lines = text.splitlines()
    assert lines[:4] == ["b: é 漢", "a:", "- 1", "- c: null"]
    assert lines[4] == "long: " + "word " * 22 + "end"
    assert dump_yaml({"a": "1e5", "b": "x\ry", "c": "x y"}) == "a: '1e5'\nb: \"x\\ry\"\nc: x y\n"
