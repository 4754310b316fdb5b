"""The notebooks are what their sources say, in both languages, and Colab's versions suit the kit."""

import ast
import importlib.util
import json
import re
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from packaging.requirements import Requirement

import finetune
from finetune.common.version import VERSION

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.name.removesuffix(".zh.ipynb") for path in FOLDER.glob("*.zh.ipynb"))


def module(name: str, folder: Path = FOLDER):
    spec = importlib.util.spec_from_file_location(f"notebooks_{name}", folder / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # for its dataclasses
    spec.loader.exec_module(loaded)
    return loaded


def pins(file: str) -> dict[str, str]:
    return module("lock").pins((FOLDER / file).read_text(encoding="utf-8"))


def cells(file: str, kind: str) -> list[str]:
    notebook = json.loads((FOLDER / file).read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def python_of(file: str) -> str:
    return "\n".join(code for code in cells(file, "code") if not code.startswith("%%"))


def shape_of(code: str) -> str:
    """The code without the values of its strings and numbers, and without names of keys."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            node.value = None
    return ast.dump(tree)


def test_the_notebooks_are_those_of_their_sources():
    written = module("make").notebooks()
    assert {*FOLDER.glob("*.ipynb")} == {*written}
    stale = [path.name for path, content in written.items() if path.read_text(encoding="utf-8") != content]
    assert not stale, "run python notebooks/make.py"


def test_a_line_of_one_language_is_left_out_of_the_other():
    code = 'a = 1  #:en\nb = 2  #:zh\nc = 3  # @param {type:"integer"}  #:zh\nd = 4'
    assert module("make").in_language(code, "en") == "a = 1\nd = 4"
    assert module("make").in_language(code, "zh") == 'b = 2\nc = 3  # @param {type:"integer"}\nd = 4'


def test_the_address_is_that_of_the_project_and_no_release_has_a_placeholder():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project["urls"]["Repository"]
    for path in FOLDER.glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        assert f"git clone --quiet --depth 1 {address} kit" in text
        assert f"{address.replace('https://github.com', 'https://colab.research.google.com/github')}/blob/" in text
    released = f"## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert not released or "OWNER" not in address


@pytest.mark.parametrize("name", ["captions", "pictures", "speech"])
@pytest.mark.parametrize(
    ("packed", "data"),
    [
        (["shelf/a/1.png", "shelf/b/2.png", "__MACOSX/shelf/._a"], "uploaded/shelf"),
        (["rows.csv", "1.png"], "uploaded/rows.csv"),
        (["mine/rows.jsonl", "mine/media/1.png"], "uploaded/mine/rows.jsonl"),
        (["a/1.png", "b/2.png"], "uploaded"),
    ],
)
def test_an_uploaded_archive_becomes_the_data(name, packed, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("mine.zip", "w") as archive:
        for file in packed:
            archive.writestr(file, "")
    (tmp_path / "uploaded" / "of-before").mkdir(parents=True)
    colab = ModuleType("google.colab")
    colab.files = SimpleNamespace(upload=lambda: {"mine.zip": b""})
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    (code,) = (code for code in cells(f"{name}.ipynb", "code") if code.startswith("if UPLOAD:"))
    names = {"UPLOAD": True, "Path": Path, "DATA": ""}
    exec(code, names)
    assert Path(names["DATA"]).as_posix() == data


@pytest.mark.parametrize("name", NAMES)
def test_recipes_suit_few_rows(name):
    """`auto` makes steps enough of them, and a fifth of 200 is enough to score."""
    code = python_of(f"{name}.ipynb")
    if "recipe = " in code:
        assert re.findall(r"\btokens_per_batch\W+(\w+)", code) == ["auto"]
        shares = [float(share) for share in re.findall(r"\bhold_out\W+([\d.]+)", code)]
        assert shares and min(shares) * 200 >= 30


@pytest.mark.parametrize("name", NAMES)
def test_twins_run_the_same_code(name):
    english, chinese = python_of(f"{name}.ipynb"), python_of(f"{name}.zh.ipynb")
    assert shape_of(english) == shape_of(chinese)
    assert not re.search("[\u4e00-\u9fff]", "".join(cells(f"{name}.ipynb", "markdown")).replace("[中文]", ""))
    for text in cells(f"{name}.zh.ipynb", "markdown"):
        assert re.search("[\u4e00-\u9fff]", text), text


@pytest.mark.parametrize("name", NAMES)
def test_functions_of_the_kit_exist(name):
    used = {
        node.attr
        for node in ast.walk(ast.parse(python_of(f"{name}.ipynb")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "finetune"
    }
    assert used and used <= {*finetune.__all__}


def test_what_colab_has_and_what_is_installed_over_it_suit_the_kit():
    versions = pins("colab-versions.txt") | pins("colab-lock.txt")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in map(Requirement, project["dependencies"]):
        version = versions[re.sub("[-_.]+", "-", requirement.name).lower()]
        assert requirement.specifier.contains(version.partition("+")[0]), f"{requirement}: Colab gets {version}"


def test_nothing_is_installed_over_what_a_kernel_has_loaded():
    assert not {*module("lock").KEPT} & {*pins("colab-lock.txt")}
    assert {*module("lock").KEPT} <= {*pins("colab-versions.txt")}
    install = (FOLDER / "install.sh").read_text(encoding="utf-8")
    assert install.count("pip install") == install.count("--no-deps") == 2
