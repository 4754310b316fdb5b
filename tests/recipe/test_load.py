import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from recipe_texts import GOOD, change, mentions, refused

from finetune.common.errors import RecipeError
from finetune.recipe.load import Recipe, dump_recipe, load_recipe


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


def test_a_hub_id_needs_the_format_hub(folder):
    text = change("path: data/products.csv", "path: some/products")
    message = refused(text)
    assert message.startswith("x.yaml:17: data.0.path: ")
    assert mentions(message, f"no such file|{folder / 'some/products'}")
    Path("x.yaml").write_text(text.replace("task: caption", "task: caption\n    format: hub"))
    source = load_recipe("x.yaml").data[0]
    assert source.path == Path("some/products") and source.format.options.split is None
    assert load_recipe("x.yaml", ["data.0.path=data/products.csv"]).data[0].path == folder / "data/products.csv"
    assert "no such file" in refused(overrides=["data.0.path=../products"])
    written = dump_recipe(load_recipe("x.yaml", ["data.0.format={kind: hub, split: train, streaming: true}"]))
    Path("y.yaml").write_text(written)
    assert dump_recipe(load_recipe("y.yaml")) == written and "path: some/products" in written


@pytest.mark.parametrize(
    ("content", "place", "words"),
    [
        (b"", "x.yaml:1: ", "mapping|empty"),
        (b"# nothing\n", "x.yaml:1: ", "mapping|empty"),
        (b"- a\n", "x.yaml:1: ", "mapping|list"),
        (b"text", "x.yaml:1: ", "mapping|'text'"),
        (b"a: 1\nb: \xff\n", "x.yaml:2: ", "UTF-8"),
        ("a: 1".encode("utf-16"), "x.yaml:1: ", "UTF-8"),
        (b"a: 1\n" * 300_000, "x.yaml: ", "1 MiB"),
        (GOOD.encode() + b"seed: 8\n", "x.yaml:31: seed: ", "twice|line 2"),
        (b"name: &a x\n", "x.yaml:1: ", "anchors"),
        (b"\x00" * 100, "x.yaml:1: ", "control character"),
        (bytes(range(256)), "x.yaml:", "UTF-8"),
        (b"{" * 10_000, "x.yaml:1: ", "nested deeper"),
        (b"a" * 100_000 + b": 1", "x.yaml:1: ", "YAML"),
        (b"? " * 10_000, "x.yaml:1: ", "nested deeper"),
    ],
)
def test_files_that_are_no_recipe_are_refused(folder, content, place, words):
    message = refused(content)
    assert message.startswith(place)
    assert mentions(message, words), message


def test_a_byte_order_mark_is_no_error(folder):
    Path("x.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    load_recipe("x.yaml")


def test_files_that_cannot_be_read_are_refused(folder):
    for path, place, words in [
        ("x.yml", "x.yml: ", "no such file|'x.yaml'"),
        ("nowhere/at/all.yaml", "nowhere/at/all.yaml: ", "no such file"),
        ("data", "data: ", "folder"),
        ("x.yaml/y", "x.yaml/y: ", "can't be read"),
        ("\0", "?: ", "can't be read"),
        ("n" * 5000, "nnn", "can't be read"),
    ]:
        message = refused(path=path)
        assert message.startswith(place)
        assert mentions(message, words), message


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


def test_reading_a_recipe_imports_no_torch(folder):
    code = "import sys; from finetune.recipe.load import load_recipe; load_recipe('x.yaml'); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "finetune.recipe.schema" in modules
    assert not {"torch", "transformers", "peft", "PIL", "numpy"} & set(modules)


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("./llm", True),
        ("../llm", True),
        ("/llm", True),
        ("~/llm", True),
        ("a.GGUF", True),
        ("a\\b", True),
        ("a/b", False),
    ],
)
def test_a_name_looks_like_a_path_or_is_one_of_the_hub(name, local, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "home"))
    override = f"model.llm.name={name}"
    if not local:
        assert load_recipe("x.yaml", [override]).model.llm.name == name
        return
    path = Path(os.path.normpath(folder / name.replace("~", str(folder / "home"))))
    message = refused(overrides=[override])
    assert message == f"--set model.llm.name: no such file or folder: {path}."
    if folder in path.parents:
        path.parent.mkdir(exist_ok=True)
        path.touch()
        assert load_recipe("x.yaml", [override]).model.llm.name == str(path)


def test_paths_that_are_wrong_are_all_told_with_what_is_like_them(folder):
    message = refused(change("data/products.csv", "data/product.csv"), ["data.0.media_folder=data/more.csv"])
    assert message.splitlines() == [
        f"--set data.0.media_folder: not a folder: {folder / 'data/more.csv'}.",
        f"x.yaml:17: data.0.path: no such file or folder: {folder / 'data/product.csv'}. Did you mean 'products.csv'?",
    ]
