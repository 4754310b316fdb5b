from pathlib import Path

import pytest
from recipe_texts import GOOD, change, mentions, refused

from finetune.common.errors import RecipeError
from finetune.recipe.explain import at, dotted_keys, expected, nearest_key, override, recipe_error
from finetune.recipe.load import dump_recipe, load_recipe
from finetune.recipe.words import Problem, shorten
from finetune.recipe.yaml_reader import read_yaml

# What is changed in GOOD, by what; the line and key of the message, and what it must mention.
MALFORMED = [
    ("name: describe-products", "name: Describe Products", 1, "name", "'Describe Products'|text|form"),
    ("name: describe-products", "name: 5", 1, "name", "5|text"),
    ("name: describe-products", "nam: x", 1, "nam", "unknown|'name'"),
    ("seed: 7", "seed: -1", 2, "seed", "-1|integer|0|4294967295"),
    ("seed: 7", "seed: true", 2, "seed", "true|integer"),
    ("seed: 7", "seed: '7'", 2, "seed", "'7'|integer"),
    ("seed: 7", "seed: 7.5", 2, "seed", "7.5|integer"),
    ("seed: 7", "seed: 007", 2, "seed", "'007'"),
    ("seed: 7", "seed: 1:30", 2, "seed", "'1:30'"),
    ("seed: 7", "seed:", 2, "seed", "null|integer"),
    ("seed: 7", "seed: [7]", 2, "seed", "a list"),
    ("seed: 7", "zzz: 7", 2, "zzz", "unknown|name, seed, model"),
    ("    name: some/llm\n", "", 4, "model.llm.name", "missing|Hub id"),
    ("name: some/llm", "name: ''", 5, "model.llm.name", "text|empty"),
    ("name: some/llm", "name: ./nothing", 5, "model.llm.name", "no such file or folder"),
    ("name: some/llm", "name: model.gguf", 5, "model.llm.name", "no such file or folder"),
    ("name: some/llm", "name: a\\b", 5, "model.llm.name", "no such file or folder"),
    ("quantize: nf4", "quantize: nf5", 6, "model.llm.quantize", "'nf5'|nf4, int8, none"),
    ("quantize: nf4", "double_quantize: no", 6, "model.llm.double_quantize", "'no'|false"),
    ("quantize: nf4", "double_quantize: On", 6, "model.llm.double_quantize", "'On'|true"),
    ("quantize: nf4", "double_quantize: 1", 6, "model.llm.double_quantize", "1|true|false"),
    ("quantize: nf4", "dtype: bf16", 6, "model.llm.dtype", "auto, bfloat16, float16, float32"),
    ("quantize: nf4", "attention: flash", 6, "model.llm.attention", "'flash'|auto, sdpa"),
    ("quantize: nf4", "chat_template: t.jinja", 6, "model.llm.chat_template", "no such file"),
    ("quantize: nf4", "chat_template: data", 6, "model.llm.chat_template", "not a file"),
    ("quantize: nf4", "chat_template: ''", 6, "model.llm.chat_template", "''|path"),
    ("quantize: nf4", "trust_remote_code: true", 6, "model.llm.trust_remote_code", "40 hex digits|null"),
    ("quantize: nf4", "revision: 1234", 6, "model.llm.revision", "1234|text|null"),
    ("quantize: nf4", "learning_rate: 1", 6, "model.llm.learning_rate", "'train.stages.0.learning_rate'"),
    ("kind: vision", "kind: visoin", 8, "model.encoders.image.kind", "'vision'"),
    ("kind: vision", "kind: 5", 8, "model.encoders.image.kind", "5|vision"),
    ("kind: vision, ", "", 8, "model.encoders.image", "'kind'|missing"),
    ("kind: vision", "knd: vision", 8, "model.encoders.image.knd", "unknown|'kind'"),
    ("kind: vision", "type: vision", 8, "model.encoders.image.type", "unknown|'kind'"),
    (", name: google/siglip", "", 8, "model.encoders.image.name", "missing"),
    (", name: google/siglip", ", nmae: x", 8, "model.encoders.image.nmae", "'name'"),
    ("name: google/siglip", "name: ~/no-such-tower", 8, "model.encoders.image.name", "no such file or folder"),
    ("google/siglip}", "google/siglip, layer: last}", 8, "model.encoders.image.layer", "integer|at most -1"),
    ("image: {kind: vision", "Image: {kind: vision", 8, "model.encoders.Image", "name|form"),
    ("image: {kind: vision", "audio: {kind: vision", 8, "model.encoders.audio", "medium|'image'|encoders.image"),
    ("    image:\n", "    imaeg:\n", 10, "model.projectors.imaeg", "no encoder|'image'"),
    ("kind: mlp", "kind: mpl", 11, "model.projectors.image.kind", "'mlp'"),
    ("hidden: 64", "hidden: 0", 12, "model.projectors.image.hidden", "0|integer|at least 1|null"),
    ("hidden: 64", "hiden: 64", 12, "model.projectors.image.hiden", "unknown|'hidden'"),
    ("hidden: 64", "factor: 2", 12, "model.projectors.image.factor", "unknown|kind, hidden"),
    ("rank: 16", "rank: 1025", 14, "adapter.rank", "1025|integer|1|1024"),
    ("rank: 16", "dropout: 1", 14, "adapter.dropout", "1|number|at least 0|below 1"),
    ("rank: 16", "targets: some", 14, "adapter.targets", "'some'|all-linear|list"),
    ("rank: 16", "targets: [q, 3]", 14, "adapter.targets.1", "3|text in quotes: '3'"),
    ("alpha: 32", "alpha: 0", 15, "adapter.alpha", "0|number|above 0"),
    ("alpha: 32", "alpha: .inf", 15, "adapter.alpha", "'.inf'|number|above 0"),
    ("products.csv", "product.csv", 17, "data.0.path", "'products.csv'"),
    ("path: data/products.csv", "path: 3", 17, "data.0.path", "3|path"),
    ("task: caption", "task: captoin", 18, "data.0.task", "'caption'"),
    ("task: caption", "task: [caption]", 18, "data.0.task", "a list|caption"),
    ("task: caption", "task: {kind: caption, promt: x}", 18, "data.0.task.promt", "'prompt'"),
    ("hold_out: 0.1", "hold_out: 0.95", 19, "data.0.hold_out", "number|0|0.9"),
    ("hold_out: 0.1", "weight: 1", 30, "evaluate.split", "evaluate|split: test|hold_out: 0.1"),
    ("hold_out: 0.1", "format: tabel", 19, "data.0.format", "'table'"),
    ("hold_out: 0.1", "format: {kind: table, delimitr: x}", 19, "data.0.format.delimitr", "'delimiter'"),
    ("hold_out: 0.1", "format: {kind: table, encoding: latin-99}", 19, "data.0.format.encoding", "'latin-99'"),
    ("products.csv", "products.csv\n    hosts: ['https://example.com']", 18, "data.0.hosts.0", "text|form"),
    ("hold_out: 0.1", "hold_out: 0.1\n    media_folder: nowhere", 20, "data.0.media_folder", "no such folder"),
    ("hold_out: 0.1", "columns: {image: 3}", 19, "data.0.columns.image", "3|text"),
    ("hold_out: 0.1", "split: test", 16, "data", "split train"),
    ("tokens_per_batch: 4096", "tokens_per_batch: 15", 21, "train.tokens_per_batch", "integer|at least 16"),
    ("tokens_per_batch: 4096", "cache: off", 21, "train.cache", "'off'|false"),
    ("name: tune", "name: align", 26, "train.stages.1.name", "'align'|train.stages.0"),
    ("[projectors]", "[]", 24, "train.stages.0.trains", "an empty list|list|1 or more"),
    ("[projectors]", "projectors", 24, "train.stages.0.trains", "'projectors'|list"),
    ("[projectors]", "[projector]", 24, "train.stages.0.trains.0", "'projectors'"),
    ("[projectors]", "[projectors.audio]", 24, "train.stages.0.trains.0", "'projectors.audio'|projectors.image"),
    ("[projectors]", "[adapter, adapter]", 24, "train.stages.0.trains.1", "'adapter'|twice"),
    (
        "[projectors]",
        "[projectors.image, projectors]",
        24,
        "train.stages.0.trains.0",
        "'projectors.image'|projectors|keep one",
    ),
    ("learning_rate: 1e-3", "learningrate: 1e-3", 25, "train.stages.0.learningrate", "'learning_rate'"),
    ("learning_rate: 1e-3", "learning_rate: 0", 25, "train.stages.0.learning_rate", "number|above 0"),
    ("learning_rate: 1e-3", "epochs: 1", 23, "train.stages.0.learning_rate", "missing"),
    ("split: test", "split: train", 30, "evaluate.split", "validation, test"),
    ("split: test", "split: validation", 30, "evaluate.split", "evaluate|split: validation|hold_out_validation: 0.1"),
    ("split: test", "limit: 0", 30, "evaluate.limit", "integer|at least 1|null"),
    ("  split: test", "", 29, "evaluate", "null|mapping"),
    ("evaluate:\n  split: test", "merge: {min_agreement: 2}", 29, "merge.min_agreement", "number|0|1"),
    ("evaluate:\n  split: test", "publish: {private: yes}", 29, "publish.private", "'yes'|true"),
    ("evaluate:\n  split: test", "publish: {repo: 1}", 29, "publish.repo", "text|null"),
]


@pytest.mark.parametrize(("old", "new", "line", "key", "words"), MALFORMED)
def test_malformed_recipes_are_refused_where_they_are_wrong(folder, old, new, line, key, words):
    message = refused(change(old, new))
    assert message.count("\n") == 0, message
    place = f"x.yaml:{line}: {key}: "
    assert message.startswith(place)
    assert mentions(message.removeprefix(place), words), message


def test_messages_read_exactly_so(folder):
    message = refused(change("quantize: nf4", "quantize: nf5"))
    assert message == "x.yaml:6: model.llm.quantize: got 'nf5'; write one of nf4, int8, none."
    message = refused(change("image: {kind: vision", "Image: {kind: vision"))
    assert message == "x.yaml:8: model.encoders.Image: a name here has the form ^[a-z][a-z0-9_]*$."
    message = refused(change("learning_rate: 1e-3", "learningrate: 1e-3"))
    assert message == "x.yaml:25: train.stages.0.learningrate: unknown key. Did you mean 'learning_rate'?"


def test_options_of_parts_are_strict_and_their_marked_paths_resolved(folder, odd_parts):
    (folder / "w.bin").touch()
    text = change("{kind: vision, name: google/siglip}", "{kind: probe, weights: w.bin, cache: c, sizes: [1, 2]}")
    Path("x.yaml").write_text(text)
    recipe = load_recipe("x.yaml")
    options = recipe.model.encoders["image"].options
    assert (options.weights, options.cache, options.sizes) == (folder / "w.bin", str(folder / "c"), (1, 2))
    Path("dumped.yaml").write_text(dump_recipe(recipe))
    assert load_recipe("dumped.yaml") == recipe
    for old, new, key, words in [
        ("w.bin", "v.bin", "weights", "no such file"),
        ("w.bin", "data", "weights", "not a file"),
        ("[1, 2]", "[1, '2']", "sizes.1", "'2'|integer"),
        ("[1, 2]", "[1, true]", "sizes.1", "true|integer"),
        ("cache: c", "exact: no", "exact", "'no'|false"),
        ("cache: c", "mode: x", "mode", "'x'|integer|list"),
        ("cache: c", "mode: [1, x]", "mode.1", "'x'|integer"),
    ]:
        message = refused(text.replace(old, new))
        assert message.startswith(f"x.yaml:8: model.encoders.image.{key}: ")
        assert mentions(message, words), message
        assert "\n" not in message


def test_all_errors_of_a_file_are_reported_in_its_order_ten_at_most(folder):
    text = change("seed: 7", "seed: x").replace("rank: 16", "rank: 0").replace("split: test", "split: tset")
    keys = [line.split(": ")[1] for line in refused(text).splitlines()]
    assert keys == ["seed", "adapter.rank", "evaluate.split"]
    lines = refused(GOOD + "".join(f"k{number}: 1\n" for number in range(15))).splitlines()
    assert len(lines) == 11
    assert "5 more" in lines[-1]
    text = change("products.csv", "gone.csv").replace("some/llm", "./gone").replace("name: tune", "name: align")
    keys = [line.split(": ")[1] for line in refused(text).splitlines()]
    assert keys == ["model.llm.name", "data.0.path", "train.stages.1.name"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stagess.1.epochs=3", "train.stagess|unknown|'train.stages.1.epochs'"),
        ("train.stages.1.epoch=3", "unknown|'train.stages.1.epochs'"),
        ("quantize=none", "unknown|'model.llm.quantize'"),
        ("train.stages.2.epochs=3", "train.stages|2 entries|0|'2'"),
        ("train.stages.-1.epochs=3", "train.stages|2 entries|0|'-1'"),
        ("train.stages.x=3", "train.stages|2 entries|0|'x'"),
        ("data.1.path=x", "data|1 entry|0|'1'"),
        ("train.stages.1.epochs", "'='|--set train.stages.1.epochs=VALUE"),
        ("train.stage.1.epoch", "'='|--set train.stages.1.epochs=VALUE"),
        ("train.stages.1.epochs=x", "'x'|integer|at least 1"),
        ("train.stages.1.epochs=", "null|integer|at least 1"),
        ("train.stages.1.epochs='3'", "'3'|integer|at least 1"),
        ("train.cache=no", "'no'|false"),
        ("seed.x=1", "seed is 7|no keys"),
        ("name.x=1", "name|mapping|text|^[a-z0-9][a-z0-9._-]*$"),
        ("seed=[", "YAML"),
        ("seed=&a 1", "anchors|aliases"),
        ("seed=1\n---\n2", "single document"),
        ("data.0.task.promt=x", "unknown|'data.0.task.prompt'"),
        ("data.0.path=data/mor.csv", "no such file|'more.csv'"),
        ("=1", "unknown"),
        ("a" + ".a" * 5000 + "=1", "nested deeper"),
        ("\udcff=\udcff", "control character"),
    ],
)
def test_overrides_that_cannot_be_are_refused_by_their_key(folder, override, words):
    message = refused(overrides=[override])
    key = override.partition("=")[0]
    place = f"--set {key}: " if len(key) < 80 and key.isprintable() else "--set "
    assert message.startswith(place)
    assert mentions(message.removeprefix(place), words), message
    assert "\n" not in message


def test_overrides_set_values_by_the_rules_of_the_file(folder):
    recipe = load_recipe(
        "x.yaml",
        [
            "train.stages.1.epochs=3",
            "train.stages.0.learning_rate=2e-5",
            "model.llm.quantize=none",
            "publish.repo=me/mine",
            "data.0.task.prompt=What = this?",
            "model.fusion={kind: prefix}",
            "train.stages.0={name: first, trains: [adapter], learning_rate: 1}",
            "train.stages.0.epochs=5",
            "data.0.path=data/more.csv",
            "data.0.format=table",
        ],
    )
    assert recipe.train.stages[1].epochs == 3
    assert (recipe.train.stages[0].name, recipe.train.stages[0].epochs) == ("first", 5)
    assert recipe.model.llm.quantize == "none"
    assert recipe.publish.repo == "me/mine"
    assert recipe.data[0].task.kind == "caption"
    assert recipe.data[0].task.options.prompt == "What = this?"
    assert recipe.data[0].path == folder / "data/more.csv"
    assert recipe.data[0].format.kind == "table"


def test_an_error_elsewhere_keeps_the_line_of_the_file_beside_overrides(folder):
    lines = refused(change("rank: 16", "rank: 0"), ["train.accumulate=0"]).splitlines()
    assert [line.split(": ")[0] for line in lines] == ["--set train.accumulate", "x.yaml:14"]


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 1024}, "an integer from 1 to 1024"),
        ({"type": "integer", "minimum": 1}, "an integer of at least 1"),
        ({"type": "number", "exclusiveMinimum": 0}, "a number above 0"),
        ({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, "a number of at least 0 and below 1"),
        ({"type": "number", "maximum": -1}, "a number of at most -1"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "text or null"),
        ({"enum": ["a", "b"]}, "one of a, b"),
        ({"type": "array", "minItems": 1}, "a list of 1 or more"),
        ({"type": "array"}, "a list"),
        ({"const": "prefix"}, "prefix"),
        ({"type": "boolean"}, "true or false"),
        ({"type": "object"}, "a mapping"),
        ({"type": "string", "format": "path"}, "a path"),
        ({"type": "string", "pattern": "^a+$"}, "text of the form ^a+$"),
        ({"type": "string", "minLength": 1}, "text that isn't empty"),
        ({"type": "integer", "exclusiveMinimum": 0, "maximum": 9}, "an integer above 0 and of at most 9"),
        ({"oneOf": [{"type": "integer"}, {"anyOf": [{"type": "null"}, {"type": "integer"}]}]}, "an integer or null"),
        ({}, "another value"),
    ],
)
def test_expected_values_are_described_from_the_schema(node, words):
    assert expected(node, {}) == words


def test_references_of_a_schema_are_followed():
    schema = {
        "$defs": {"Width": {"anyOf": [{"$ref": "#/$defs/Count"}, {"type": "null"}]}, "Count": {"type": "integer"}}
    }
    assert expected({"$ref": "#/$defs/Width"}, schema) == "an integer or null"


def document(text: str):
    return read_yaml(text, "x.yaml")


SCHEMA = {  # of {size: ..., sections: [{name: ...}], by_name: {...}, by_pattern: {...}}
    "properties": {
        "size": {"type": "integer"},
        "sections": {"type": "array", "items": {"properties": {"name": {"type": "string"}}}},
        "by_name": {"additionalProperties": {"properties": {"rate": {"type": "number"}}}},
        "by_pattern": {"patternProperties": {"^[a-z]+$": {"properties": {"share": {"type": "number"}}}}},
    }
}


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("sections: [{}, {}]", "sections.0 sections.0.name sections.1 sections.1.name"),
        ("by_name: {x: {}}", "by_name.x by_name.x.rate"),
        ("by_pattern: {y: null}", "by_pattern.y by_pattern.y.share"),
    ],
)
def test_the_keys_are_those_that_a_document_has_or_may_have(text, keys):
    value = document(text).value
    top = {"size", "sections", "by_name", "by_pattern"}
    found = list(dotted_keys(SCHEMA, value, SCHEMA))
    assert {key for key in found if key.startswith(f"{next(iter(value))}.")} == set(keys.split())
    assert {key for key in found if "." not in key} == top
    for key in found:
        assert nearest_key(key, document(text), SCHEMA) == key


def test_the_nearest_key_ends_in_what_was_written_or_is_spelt_most_alike():
    text = "by_name: {x: {}}"
    assert nearest_key("rate", document(text), SCHEMA) == "by_name.x.rate"
    assert nearest_key("by_name.x.rat", document(text), SCHEMA) == "by_name.x.rate"
    assert nearest_key("sise", document(text), SCHEMA) == "size"
    assert nearest_key("qqqqqq", document(text), SCHEMA) is None


def test_schema_and_value_at_a_location():
    value = {"by_name": {"a": {"rate": 0.5}}, "sections": [{"name": "x"}]}
    assert at(("by_name", "a", "rate"), value, SCHEMA) == ({"type": "number"}, 0.5)
    assert at(("sections", 0, "name"), value, SCHEMA) == ({"type": "string"}, "x")
    assert at(("sections", 1, "name"), value, SCHEMA) == ({}, None)
    assert at(("nothing", "here"), value, SCHEMA) == ({}, None)


def test_problems_are_told_in_the_order_of_the_file_ten_at_most():
    read = document("".join(f"k{number}: 1\n" for number in range(12)))
    problems = [Problem((f"k{number}",), "is wrong.") for number in range(11, -1, -1)]
    lines = str(recipe_error(read, problems[2:])).splitlines()
    assert lines == [f"x.yaml:{number + 1}: k{number}: is wrong." for number in range(10)]
    lines = str(recipe_error(read, problems)).splitlines()
    assert len(lines) == 11 and lines[9] == "x.yaml:10: k9: is wrong." and lines[10] == "... and 2 more."
    assert str(recipe_error(read, [Problem((), "is wrong.")])) == "x.yaml:1: is wrong."


def overridden(text: str, *assignments: str):
    read = document(text)
    for assignment in assignments:
        override(read, assignment, SCHEMA)
    return read


def test_an_override_makes_the_sections_above_it():
    assert overridden("{}", "a.b.c=1", "a.b.d=x=y").value == {"a": {"b": {"c": 1, "d": "x=y"}}}
    assert overridden("part: a", "part.alpha=2").value == {"part": {"kind": "a", "alpha": 2}}
    assert overridden("sections: [{name: x}]", "sections.0.name=[1]").value == {"sections": [{"name": [1]}]}


def test_what_is_below_an_override_has_its_place():
    read = overridden("size: 1\npart:\n  kind: a\n  alpha: 2\nsections: []\n", "part={kind: b, beta: x}")
    for location in (("part",), ("part", "beta"), ("part", "alpha")):
        assert read.place(location).text == "--set part"
    assert [read.place((key,)).line for key in ("size", "sections", "part")] == [1, 5, 0]
    read = overridden("part: a\n", "part.alpha=1")
    assert read.place(("part",)).text == read.place(("part", "alpha")).text == "--set part.alpha"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("sections.1.name=x", "--set sections.1.name: sections has 1 entry, counted from 0; there is no '1'."),
        ("size.x=1", "--set size.x: size is 3; it has no keys."),
        ("sise", "--set sise: no '='; write --set size=VALUE."),
        ("q" * 90, f"--set {shorten('q' * 90, 80)}: no '='; write --set {shorten('q' * 90)}=VALUE."),
        (".".join("a" * 21) + "=1", f"--set {'.'.join('a' * 21)}: no key is nested deeper than 20 levels."),
    ],
)
def test_an_override_that_cannot_be_says_what_there_is(assignment, message):
    with pytest.raises(RecipeError) as caught:
        overridden("sections: [{}]\nsize: 3\n", assignment)
    assert str(caught.value) == message
    overridden("{}", ".".join("a" * 20) + "=1")
