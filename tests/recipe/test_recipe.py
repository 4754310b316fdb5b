import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import Field

from finetune.common.errors import RecipeError
from finetune.common.registry import PartOptions, load_part, part_names
from finetune.recipe import conflicts
from finetune.recipe import schema as recipe_module
from finetune.recipe.load import dump_recipe, load_recipe
from finetune.recipe.schema import Projector, Recipe, schema

GOOD = """\
name: describe-products
seed: 7
model:
  llm:
    name: some/llm
    quantize: nf4
  encoders:
    image: {kind: vision, name: google/siglip}
  projectors:
    image:
      kind: mlp
      hidden: 64
adapter:
  rank: 16
  alpha: 32
data:
  - path: data/products.csv
    task: caption
    hold_out: 0.1
train:
  tokens_per_batch: 4096
  stages:
    - name: align
      trains: [projectors]
      learning_rate: 1e-3
    - name: tune
      trains: [projectors, adapter]
      learning_rate: 2.0e-4
evaluate:
  split: test
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A recipe's folder, as the current one so that messages show short names."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/products.csv").write_text("image,caption\n")
    (tmp_path / "data/more.csv").write_text("image,caption\n")
    (tmp_path / "x.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
    for module in (recipe_module, conflicts):
        monkeypatch.setattr(module, "load_part", lambda *where: odd.get(where) or load_part(*where))
    monkeypatch.setattr(recipe_module, "part_names", lambda f: (*part_names(f), *([extra[f]] if f in extra else [])))
    recipe_module.cached_schema.cache_clear()
    yield
    recipe_module.cached_schema.cache_clear()


def refused(text=None, overrides=(), path="x.yaml"):
    if text is not None:
        Path(path).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert max(map(len, message.splitlines())) < 300 + len(str(Path.cwd()))
    return message


def test_good_recipe_is_read_with_defaults_and_absolute_paths(folder):
    recipe = load_recipe("x.yaml")
    assert recipe.name == "describe-products"
    assert recipe.adapter.alpha == 32.0
    assert isinstance(recipe.adapter.alpha, float)
    assert recipe.train.stages[0].learning_rate == 1e-3
    assert recipe.model.llm.name == "some/llm"
    assert recipe.model.encoders["image"].options.name == "google/siglip"
    assert recipe.model.projectors["image"].kind == "mlp"
    assert recipe.model.projectors["image"].options.hidden == 64
    assert recipe.model.fusion.kind == "prefix"
    assert recipe.data[0].task.kind == "caption"
    assert recipe.data[0].path == folder / "data/products.csv"
    assert (recipe.evaluate.limit, recipe.merge.rows, recipe.publish.repo) == (None, 64, None)


def test_paths_are_relative_to_the_recipe_not_to_the_current_folder(folder, monkeypatch):
    monkeypatch.chdir("/")
    assert load_recipe(folder / "x.yaml").data[0].path == folder / "data/products.csv"


def test_names_that_exist_beside_the_recipe_are_local(folder):
    (folder / "some/llm").mkdir(parents=True)
    (folder / "tower").mkdir()
    recipe = load_recipe("x.yaml", ["model.encoders.image.name=./tower"])
    assert recipe.model.llm.name == str(folder / "some/llm")
    assert recipe.model.encoders["image"].options.name == str(folder / "tower")


def test_adapter_may_be_null_but_is_there_by_default(folder):
    assert load_recipe("x.yaml", ["adapter=null", "train.stages.1.trains=[projectors]"]).adapter is None
    Path("x.yaml").write_text(GOOD.replace("adapter:\n  rank: 16\n  alpha: 32\n", ""))
    assert load_recipe("x.yaml").adapter.rank == 16


def change(old, new):
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


# what is changed in GOOD, by what, the line and key of the refusal, a part of its text
MALFORMED = [
    (
        "name: describe-products",
        "name: Describe Products",
        1,
        "name",
        "got 'Describe Products'; write text of the form",
    ),
    ("name: describe-products", "name: 5", 1, "name", "got 5; write text"),
    ("name: describe-products", "nam: x", 1, "nam", "unknown key. Did you mean 'name'?"),
    ("seed: 7", "seed: -1", 2, "seed", "got -1; write an integer from 0 to 4294967295"),
    ("seed: 7", "seed: true", 2, "seed", "got true; write an integer"),
    ("seed: 7", "seed: '7'", 2, "seed", "got '7'; write an integer"),
    ("seed: 7", "seed: 7.5", 2, "seed", "got 7.5; write an integer"),
    ("seed: 7", "seed: 007", 2, "seed", "got '007'"),
    ("seed: 7", "seed: 1:30", 2, "seed", "got '1:30'"),
    ("seed: 7", "seed:", 2, "seed", "got null; write an integer"),
    ("seed: 7", "seed: [7]", 2, "seed", "got a list"),
    ("seed: 7", "zzz: 7", 2, "zzz", "unknown key. Keys here: name, seed, model"),
    ("    name: some/llm\n", "", 4, "model.llm.name", "missing: Hub id"),
    ("name: some/llm", "name: ''", 5, "model.llm.name", "write text that isn't empty"),
    ("name: some/llm", "name: ./nothing", 5, "model.llm.name", "no such file or folder: "),
    ("name: some/llm", "name: model.gguf", 5, "model.llm.name", "no such file or folder: "),
    ("name: some/llm", "name: a\\b", 5, "model.llm.name", "no such file or folder: "),
    ("quantize: nf4", "quantize: nf5", 6, "model.llm.quantize", "got 'nf5'; write one of nf4, int8, none."),
    ("quantize: nf4", "double_quantize: no", 6, "model.llm.double_quantize", "got 'no'; write false."),
    ("quantize: nf4", "double_quantize: On", 6, "model.llm.double_quantize", "got 'On'; write true."),
    ("quantize: nf4", "double_quantize: 1", 6, "model.llm.double_quantize", "got 1; write true or false."),
    ("quantize: nf4", "dtype: bf16", 6, "model.llm.dtype", "one of auto, bfloat16, float16, float32"),
    ("quantize: nf4", "attention: flash", 6, "model.llm.attention", "got 'flash'; write one of auto, sdpa"),
    ("quantize: nf4", "chat_template: t.jinja", 6, "model.llm.chat_template", "no such file: "),
    ("quantize: nf4", "chat_template: data", 6, "model.llm.chat_template", "not a file: "),
    ("quantize: nf4", "chat_template: ''", 6, "model.llm.chat_template", "got ''; write a path"),
    (
        "quantize: nf4",
        "trust_remote_code: true",
        6,
        "model.llm.trust_remote_code",
        "commit of 40 hex digits; it is null",
    ),
    ("quantize: nf4", "revision: 1234", 6, "model.llm.revision", "got 1234; write text or null"),
    ("quantize: nf4", "learning_rate: 1", 6, "model.llm.learning_rate", "Did you mean 'train.stages.0.learning_rate'?"),
    ("kind: vision", "kind: visoin", 8, "model.encoders.image.kind", "did you mean 'vision'?"),
    ("kind: vision", "kind: 5", 8, "model.encoders.image.kind", "got 5; write one of "),
    ("kind: vision, ", "", 8, "model.encoders.image", "'kind' is missing: one of "),
    (", name: google/siglip", "", 8, "model.encoders.image.name", "missing: "),
    (", name: google/siglip", ", nmae: x", 8, "model.encoders.image.nmae", "Did you mean 'name'?"),
    ("name: google/siglip", "name: ~/no-such-tower", 8, "model.encoders.image.name", "no such file or folder: "),
    (
        "google/siglip}",
        "google/siglip, layer: last}",
        8,
        "model.encoders.image.layer",
        "write an integer of at most -1",
    ),
    ("image: {kind: vision", "Image: {kind: vision", 8, "model.encoders.Image", "a name here has the form"),
    ("image: {kind: vision", "audio: {kind: vision", 8, "model.encoders.audio", "takes the medium 'image'"),
    ("    image:\n", "    imaeg:\n", 10, "model.projectors.imaeg", "no encoder has this name. Did you mean 'image'?"),
    ("kind: mlp", "kind: mpl", 11, "model.projectors.image.kind", "did you mean 'mlp'?"),
    ("hidden: 64", "hidden: 0", 12, "model.projectors.image.hidden", "got 0; write an integer of at least 1 or null"),
    ("hidden: 64", "hiden: 64", 12, "model.projectors.image.hiden", "unknown key. Did you mean 'hidden'?"),
    ("hidden: 64", "factor: 2", 12, "model.projectors.image.factor", "unknown key. Keys here: kind, hidden."),
    ("rank: 16", "rank: 1025", 14, "adapter.rank", "got 1025; write an integer from 1 to 1024."),
    ("rank: 16", "dropout: 1", 14, "adapter.dropout", "got 1; write a number of at least 0 and below 1."),
    ("rank: 16", "targets: some", 14, "adapter.targets", "got 'some'; write all-linear or a list."),
    ("rank: 16", "targets: [q, 3]", 14, "adapter.targets.1", "got 3; write text."),
    ("alpha: 32", "alpha: 0", 15, "adapter.alpha", "got 0; write a number above 0."),
    ("alpha: 32", "alpha: .inf", 15, "adapter.alpha", "got '.inf'; write a number above 0."),
    ("products.csv", "product.csv", 17, "data.0.path", "Did you mean 'products.csv'?"),
    ("path: data/products.csv", "path: 3", 17, "data.0.path", "got 3; write a path"),
    ("task: caption", "task: captoin", 18, "data.0.task", "did you mean 'caption'?"),
    ("task: caption", "task: [caption]", 18, "data.0.task", "got a list; write one of "),
    ("task: caption", "task: {kind: caption, promt: x}", 18, "data.0.task.promt", "Did you mean 'prompt'?"),
    ("hold_out: 0.1", "hold_out: 0.95", 19, "data.0.hold_out", "write a number from 0 to 0.9"),
    ("hold_out: 0.1", "weight: 1", 30, "evaluate.split", "no rows to evaluate on: add a source with split: test, or"),
    ("hold_out: 0.1", "format: tabel", 19, "data.0.format", "did you mean 'table'?"),
    ("hold_out: 0.1", "format: {kind: table, delimitr: x}", 19, "data.0.format.delimitr", "Did you mean 'delimiter'?"),
    ("hold_out: 0.1", "format: {kind: table, encoding: latin-99}", 19, "data.0.format.encoding", "got 'latin-99'"),
    (
        "products.csv",
        "products.csv\n    hosts: ['https://example.com']",
        18,
        "data.0.hosts.0",
        "text of the form",
    ),
    ("hold_out: 0.1", "hold_out: 0.1\n    media_folder: nowhere", 20, "data.0.media_folder", "no such folder: "),
    ("hold_out: 0.1", "columns: {image: 3}", 19, "data.0.columns.image", "got 3; write text."),
    ("hold_out: 0.1", "split: test", 16, "data", "nothing to train on"),
    ("tokens_per_batch: 4096", "tokens_per_batch: 15", 21, "train.tokens_per_batch", "an integer of at least 16"),
    ("tokens_per_batch: 4096", "cache: off", 21, "train.cache", "got 'off'; write false."),
    ("name: tune", "name: align", 26, "train.stages.1.name", "'align' is train.stages.0 already"),
    ("[projectors]", "[]", 24, "train.stages.0.trains", "got an empty list; write a list of 1 or more"),
    ("[projectors]", "projectors", 24, "train.stages.0.trains", "got 'projectors'; write a list"),
    ("[projectors]", "[projector]", 24, "train.stages.0.trains.0", "Did you mean 'projectors'?"),
    ("[projectors]", "[projectors.audio]", 24, "train.stages.0.trains.0", "got 'projectors.audio'; write one of "),
    ("[projectors]", "[adapter, adapter]", 24, "train.stages.0.trains.1", "'adapter' is written twice"),
    ("[projectors]", "[projectors.image, projectors]", 24, "train.stages.0.trains.0", "keep one"),
    ("learning_rate: 1e-3", "learningrate: 1e-3", 25, "train.stages.0.learningrate", "Did you mean 'learning_rate'?"),
    ("learning_rate: 1e-3", "learning_rate: 0", 25, "train.stages.0.learning_rate", "a number above 0"),
    ("learning_rate: 1e-3", "epochs: 1", 23, "train.stages.0.learning_rate", "missing: "),
    ("split: test", "split: train", 30, "evaluate.split", "write one of validation, test."),
    (
        "split: test",
        "split: validation",
        30,
        "evaluate.split",
        "add a source with split: validation, or hold_out_validation: 0.1 on one.",
    ),
    ("split: test", "limit: 0", 30, "evaluate.limit", "an integer of at least 1 or null"),
    ("  split: test", "", 29, "evaluate", "got null; write a mapping"),
    ("evaluate:\n  split: test", "merge: {min_agreement: 2}", 29, "merge.min_agreement", "a number from 0 to 1."),
    ("evaluate:\n  split: test", "publish: {private: yes}", 29, "publish.private", "got 'yes'; write true."),
    ("evaluate:\n  split: test", "publish: {repo: 1}", 29, "publish.repo", "text or null"),
]


@pytest.mark.parametrize(("old", "new", "line", "key", "text"), MALFORMED)
def test_malformed_recipes_are_refused_where_they_are_wrong(folder, old, new, line, key, text):
    message = refused(change(old, new))
    assert message.count("\n") == 0, message
    assert message.startswith(f"x.yaml:{line}: {key}: ")
    assert text in message


def test_messages_read_exactly_so(folder):
    message = refused(change("quantize: nf4", "quantize: nf5"))
    assert message == "x.yaml:6: model.llm.quantize: got 'nf5'; write one of nf4, int8, none."
    message = refused(change("learning_rate: 1e-3", "learningrate: 1e-3"))
    assert message == "x.yaml:25: train.stages.0.learningrate: unknown key. Did you mean 'learning_rate'?"


def test_an_encoder_without_projector_is_refused(folder):
    text = change("    image:\n      kind: mlp\n      hidden: 64\n", "    {}\n").replace("projectors]", "adapter]")
    text = text.replace("[projectors, adapter]", "[adapter]")
    assert "x.yaml:8: model.encoders.image: has no projector: add model.projectors.image." in refused(text)


LORA = "tune_encoders={image: {rank: 4}}"


@pytest.mark.parametrize(
    "overrides, key, text",
    [
        (["model.fusion=cross_attention"], "train.stages.0.trains", "begins as if it weren't there, so that nothing"),
        ([LORA], "train.cache", "keeps what frozen encoders say, but tune_encoders lets one change"),
        (["tune_encoders={audio: {rank: 4}}", "train.cache=false"], "tune_encoders.audio", "no encoder has this name"),
        (["tune_encoders={image: {}}", "train.cache=false"], "tune_encoders.image", "write last_layers, or rank"),
        (
            ["tune_encoders={image: {rank: 4, last_layers: 1}}", "train.cache=false"],
            "tune_encoders.image",
            "one of them",
        ),
        ([LORA, "train.cache=false"], "tune_encoders.image", "no stage trains it: add 'encoders.image'"),
        (["train.stages.1.trains=[encoders.image]"], "train.stages.1.trains.0", "stands in tune_encoders"),
        (["train.stages.1.trains=[fusion]"], "train.stages.1.trains.0", "got 'fusion'; write one of projectors"),
        (
            ["train.stages.0.learning_rates={adapter: 0.1}"],
            "train.stages.0.learning_rates.adapter",
            "this stage doesn't train it; it trains projectors",
        ),
        (
            ["train.stages.0.learning_rates={projectors: 0}"],
            "train.stages.0.learning_rates.projectors",
            "got 0; write a number above 0",
        ),
        (["train.stages.0.sources=[1]"], "train.stages.0.sources.0", "got 1; write numbers of training sources: 0"),
        (["data.0.name=Two words"], "data.0.name", "got 'Two words'"),
        (["media.max_seconds=0"], "media.max_seconds", "above 0"),
        (
            ["model.encoders.image={kind: whisper, name: some/whisper}"],
            "model.encoders.image",
            "'whisper' takes the medium 'audio': write encoders.audio",
        ),
    ],
)
def test_what_cannot_work_together_is_refused_by_its_key(folder, overrides, key, text):
    lines = [line for line in refused(overrides=overrides).splitlines() if f"{key}: " in line or f" {key}:" in line]
    assert lines and text in lines[0], refused(overrides=overrides)


def test_an_adapter_that_is_null_cannot_be_trained(folder):
    message = refused(change("adapter:\n  rank: 16\n  alpha: 32\n", "adapter: null\n"))
    assert message == "x.yaml:25: train.stages.1.trains.1: 'adapter' can't be trained: adapter is null."


def test_without_an_evaluate_section_rows_to_evaluate_are_asked_of_data(folder):
    text = change("evaluate:\n  split: test\n", "").replace("    hold_out: 0.1\n", "")
    message = refused(text)
    assert message.startswith("x.yaml:16: data: no rows to evaluate on: add a source with split: test, or hold_out")


def test_a_recipe_can_be_built_in_python(folder):
    recipe = load_recipe("x.yaml")
    assert Recipe.model_validate(dict(recipe)) == recipe
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert Projector.parse(recipe.model.projectors["image"]) is recipe.model.projectors["image"]


def test_the_same_rows_in_two_splits_are_refused_however_the_path_is_written(folder):
    (folder / "link.csv").symlink_to("data/products.csv")
    for path in ("data/products.csv", "./data/../data/products.csv", "link.csv", folder / "data/products.csv"):
        message = refused(change("train:\n", f"  - {{path: {path}, task: caption, split: test}}\ntrain:\n"))
        assert message == "x.yaml:20: data.1.path: also data.0, with split train; the same rows can't be in test too."


def test_the_same_rows_with_another_share_held_out_are_refused(folder):
    message = refused(change("train:\n", "  - {path: data/products.csv, task: chat, hold_out: 0.2}\ntrain:\n"))
    assert message.startswith("x.yaml:20: data.1.path: also data.0, with hold_out 0.1: ")
    text = change("train:\n", "  - {path: data/products.csv, task: chat, hold_out: 0.1}\ntrain:\n")
    Path("x.yaml").write_text(text)
    load_recipe("x.yaml")


def test_a_hub_id_needs_the_format_hub(folder):
    text = change("path: data/products.csv", "path: some/products")
    message = refused(text)
    assert message == f"x.yaml:17: data.0.path: no such file or folder: {folder / 'some/products'}."
    Path("x.yaml").write_text(text.replace("task: caption", "task: caption\n    format: hub"))
    source = load_recipe("x.yaml").data[0]
    assert source.path == Path("some/products") and source.format.options.split is None
    assert load_recipe("x.yaml", ["data.0.path=data/products.csv"]).data[0].path == folder / "data/products.csv"
    assert "no such file or folder" in refused(overrides=["data.0.path=../products"])
    written = dump_recipe(load_recipe("x.yaml", ["data.0.format={kind: hub, split: train, streaming: true}"]))
    Path("y.yaml").write_text(written)
    assert dump_recipe(load_recipe("y.yaml")) == written and "path: some/products" in written


def test_other_splits_of_a_dataset_are_other_rows(folder):
    other = "  - {path: me/mine, format: {kind: hub, split: %s}, task: caption, split: test}\ntrain:\n"
    text = change("path: data/products.csv", "path: me/mine\n    format: {kind: hub, split: train}")
    Path("x.yaml").write_text(text.replace("train:\n", other % "validation", 1))
    assert len(load_recipe("x.yaml").data) == 2
    assert "also data.0, with split train" in refused(text.replace("train:\n", other % "train", 1))
    message = refused(
        change("train:\n", "  - {path: data/products.csv, task: caption, format: table, split: test}\ntrain:\n")
    )
    assert "also data.0, with split train" in message


def test_a_test_source_is_enough_to_evaluate(folder):
    text = change("hold_out: 0.1", "weight: 2").replace(
        "train:\n", "  - {path: data/more.csv, task: caption, split: test}\ntrain:\n", 1
    )
    Path("x.yaml").write_text(text)
    assert [source.split for source in load_recipe("x.yaml").data] == ["train", "test"]


def test_remote_code_with_a_commit_is_accepted(folder):
    commit = "0123456789abcdef" * 2 + "01234567"
    load_recipe("x.yaml", ["model.llm.trust_remote_code=true", f"model.llm.revision={commit}"])
    assert "40 hex" in refused(overrides=["model.llm.trust_remote_code=true", "model.llm.revision=main"])


def test_a_task_whose_media_no_encoder_takes_is_refused(folder, odd_parts):
    message = refused(change("task: caption", "task: listen"))
    assert message == "x.yaml:18: data.0.task: 'listen' needs an encoder for 'audio'; encoders: image."


def test_options_of_parts_are_strict_and_their_marked_paths_resolved(folder, odd_parts):
    (folder / "w.bin").touch()
    text = change("{kind: vision, name: google/siglip}", "{kind: probe, weights: w.bin, cache: c, sizes: [1, 2]}")
    Path("x.yaml").write_text(text)
    recipe = load_recipe("x.yaml")
    options = recipe.model.encoders["image"].options
    assert (options.weights, options.cache, options.sizes) == (folder / "w.bin", str(folder / "c"), (1, 2))
    Path("dumped.yaml").write_text(dump_recipe(recipe))
    assert load_recipe("dumped.yaml") == recipe
    for old, new, problem in [
        ("w.bin", "v.bin", "weights: no such file: "),
        ("w.bin", "data", "weights: not a file: "),
        ("[1, 2]", "[1, '2']", "sizes.1: got '2'; write an integer."),
        ("[1, 2]", "[1, true]", "sizes.1: got true; write an integer."),
        ("cache: c", "exact: no", "exact: got 'no'; write false."),
        ("cache: c", "mode: x", "mode: got 'x'; write an integer or a list."),
        ("cache: c", "mode: [1, x]", "mode.1: got 'x'; write an integer."),
    ]:
        message = refused(text.replace(old, new))
        assert message.startswith(f"x.yaml:8: model.encoders.image.{problem}")
        assert "\n" not in message


def test_all_errors_of_a_file_are_told_in_its_order_ten_at_most(folder):
    text = change("seed: 7", "seed: x").replace("rank: 16", "rank: 0").replace("split: test", "split: tset")
    keys = [line.split(": ")[1] for line in refused(text).splitlines()]
    assert keys == ["seed", "adapter.rank", "evaluate.split"]
    lines = refused(GOOD + "".join(f"k{number}: 1\n" for number in range(15))).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "... and 5 more."
    text = change("products.csv", "gone.csv").replace("some/llm", "./gone").replace("name: tune", "name: align")
    keys = [line.split(": ")[1] for line in refused(text).splitlines()]
    assert keys == ["model.llm.name", "data.0.path", "train.stages.1.name"]


@pytest.mark.parametrize(
    ("content", "start"),
    [
        (b"", "x.yaml:1: a recipe is a mapping of keys; this is empty."),
        (b"# nothing\n", "x.yaml:1: a recipe is a mapping"),
        (b"- a\n", "x.yaml:1: a recipe is a mapping of keys; this is a list."),
        (b"text", "x.yaml:1: a recipe is a mapping of keys; this is 'text'."),
        (b"a: 1\nb: \xff\n", "x.yaml:2: not UTF-8"),
        ("a: 1".encode("utf-16"), "x.yaml:1: not UTF-8"),
        (b"a: 1\n" * 300_000, "x.yaml: larger than 1 MiB"),
        (GOOD.encode() + b"seed: 8\n", "x.yaml:31: seed: written twice, first in line 2."),
        (b"name: &a x\n", "x.yaml:1: anchors"),
        (b"\x00" * 100, "x.yaml:1: a control character"),
        (bytes(range(256)), "x.yaml:"),
        (b"{" * 10_000, "x.yaml:1: "),
        (b"a" * 100_000 + b": 1", "x.yaml:1: "),
        (b"? " * 10_000, "x.yaml:1: "),
    ],
)
def test_files_that_are_no_recipe_are_refused(folder, content, start):
    assert refused(content).startswith(start)


def test_a_byte_order_mark_is_no_error(folder):
    Path("x.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    load_recipe("x.yaml")


def test_files_that_cannot_be_read_are_refused(folder):
    assert refused(path="y.yaml") == "y.yaml: no such file. Did you mean 'x.yaml'?"
    assert refused(path="nowhere/at/all.yaml") == "nowhere/at/all.yaml: no such file."
    assert refused(path="data").startswith("data: a folder")
    assert refused(path="x.yaml/y").startswith("x.yaml/y: can't be read: ")
    assert refused(path="\0").startswith("?: can't be read: ")
    assert "can't be read" in refused(path="n" * 5000)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stagess.1.epochs=3", "train.stagess: unknown key. Did you mean 'train.stages.1.epochs'?"),
        ("train.stages.1.epoch=3", "unknown key. Did you mean 'train.stages.1.epochs'?"),
        ("quantize=none", "unknown key. Did you mean 'model.llm.quantize'?"),
        ("train.stages.2.epochs=3", "train.stages has 2 entries, counted from 0; there is no '2'."),
        ("train.stages.-1.epochs=3", "train.stages has 2 entries, counted from 0; there is no '-1'."),
        ("train.stages.x=3", "train.stages has 2 entries, counted from 0; there is no 'x'."),
        ("data.1.path=x", "data has 1 entry, counted from 0; there is no '1'."),
        ("train.stages.1.epochs", "no '='; write --set train.stages.1.epochs=VALUE."),
        ("train.stage.1.epoch", "no '='; write --set train.stages.1.epochs=VALUE."),
        ("train.stages.1.epochs=x", "got 'x'; write an integer of at least 1."),
        ("train.stages.1.epochs=", "got null; write an integer of at least 1."),
        ("train.stages.1.epochs='3'", "got '3'; write an integer of at least 1."),
        ("train.cache=no", "got 'no'; write false."),
        ("seed.x=1", "seed is 7, with no keys in it."),
        ("name.x=1", "name: got a mapping; write text of the form ^[a-z0-9][a-z0-9._-]*$."),
        ("seed=[", "not YAML: "),
        ("seed=&a 1", "anchors and aliases"),
        ("seed=1\n---\n2", "a second document"),
        ("data.0.task.promt=x", "unknown key. Did you mean 'data.0.task.prompt'?"),
        ("data.0.path=data/mor.csv", "no such file or folder: "),
        ("=1", "unknown key. "),
        ("a" + ".a" * 5000 + "=1", "no key is nested deeper than "),
        ("\udcff=\udcff", "a control character"),
    ],
)
def test_overrides_that_cannot_be_are_refused_by_their_key(folder, override, message):
    text = refused(overrides=[override])
    key = override.partition("=")[0]
    assert text.startswith(f"--set {key}: {message}" if len(key) < 80 and key.isprintable() else "--set ")
    assert message in text
    assert "\n" not in text


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


def test_a_dumped_recipe_is_read_back_equal_with_every_key(folder):
    recipe = load_recipe("x.yaml", ["data.0.task.prompt='no # \"2e-4\"'", "data.0.columns={on: '1e5', 'a.b': ~x}"])
    written = dump_recipe(recipe)
    (folder / "elsewhere").mkdir()
    Path("elsewhere/y.yaml").write_text(written)
    again = load_recipe("elsewhere/y.yaml")
    assert again == recipe
    assert dump_recipe(again) == written
    keys = re.findall(r"^(\w+):", written, re.M)
    assert keys == list(Recipe.model_fields)
    for key in ("rslora", "warmup", "min_agreement", "private", "max_grad_norm", "tokens"):
        assert f" {key}: " in written


def test_a_recipe_cannot_be_changed(folder):
    recipe = load_recipe("x.yaml")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 8


def test_bytes_changed_at_random_give_a_recipe_or_a_recipe_error(folder):
    chance = random.Random(0)
    good = GOOD.encode()
    alphabet = bytes(range(256)) + b"{}[]:,-&*!|>'\"%@`#?~\n\t " * 8
    refusals = 0
    for _ in range(300):
        content = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            start = chance.randrange(len(content))
            action = chance.randrange(3)
            if action == 0:
                content[start] = chance.choice(alphabet)
            elif action == 1:
                del content[start : start + chance.randint(1, 40)]
            else:
                content[start:start] = bytes(chance.choices(alphabet, k=chance.randint(1, 3)))
        Path("x.yaml").write_bytes(content)
        try:
            load_recipe("x.yaml")
        except RecipeError as error:
            refusals += 1
            for line in str(error).splitlines():
                assert line.startswith(("x.yaml:", "... and "))
                assert len(line) < 300 + len(str(folder))
    assert 150 < refusals < 300


def mismatch(value, node, root, where="recipe"):
    """The first place where a value isn't what a JSON schema says; of the keywords, those that ours uses."""
    if "$ref" in node:
        return mismatch(value, root["$defs"][node["$ref"].rpartition("/")[2]], root, where)
    if choices := node.get("anyOf"):
        found = [mismatch(value, choice, root, where) for choice in choices]
        return None if None in found else found[0]
    if value not in node.get("enum", [value]) or value != node.get("const", value):
        return f"{where}: not one of those listed"
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
    kind = ({"object": dict, "array": list} | kinds).get(node.get("type"), object)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
        return f"{where}: not {node['type']}"
    if isinstance(value, int | float) and not node.get("minimum", value) <= value <= node.get("maximum", value):
        return f"{where}: out of range"
    if isinstance(value, list):
        inside = [mismatch(item, node["items"], root, f"{where}[]") for item in value]
        return next((each for each in inside if each), None)
    if isinstance(value, dict):
        if missing := set(node.get("required", ())) - set(value):
            return f"{where}: {missing} missing"
        others = [*node.get("patternProperties", {}).values(), node.get("additionalProperties", {})][0]
        for key, item in value.items():
            inner = node.get("properties", {}).get(key, others)
            if inner is False:
                return f"{where}.{key}: unknown"
            if found := mismatch(item, inner, root, f"{where}.{key}"):
                return found
    return None


def test_the_json_schema_takes_the_dumped_recipe_and_knows_the_options_of_parts(folder):
    root = schema()
    good = load_recipe("x.yaml").model_dump(mode="json")
    assert mismatch(good, root, root) is None
    good["model"]["fusion"] = "prefix"
    assert mismatch(good, root, root) is None
    for change_one in (
        lambda recipe: recipe.update(sed=1),
        lambda recipe: recipe["model"]["projectors"]["image"].update(hiden=1),
        lambda recipe: recipe["model"]["projectors"]["image"].update(kind="mpl"),
        lambda recipe: recipe["model"]["encoders"].update(image="vision"),
        lambda recipe: recipe["adapter"].update(rank=5000),
        lambda recipe: recipe["data"][0]["task"].update(prompt=3),
    ):
        bad = load_recipe("x.yaml").model_dump(mode="json")
        change_one(bad)
        assert mismatch(bad, root, root)


def test_every_key_of_the_schema_is_described():
    root = schema()
    for title, definition in {"Recipe": root, **root["$defs"]}.items():
        for key, node in definition.get("properties", {}).items():
            assert node.get("description"), f"{title}.{key}"


def test_reading_a_recipe_imports_no_torch(folder):
    code = "import sys; from finetune.recipe.load import load_recipe; load_recipe('x.yaml'); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "finetune.recipe.schema" in modules
    assert not {"torch", "transformers", "peft", "PIL", "numpy"} & set(modules)
