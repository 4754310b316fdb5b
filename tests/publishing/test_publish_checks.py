"""What must not be published is refused, and every problem says what to do."""

import json
from pathlib import Path

import pytest
from loopback import asked_of, hub_on_loopback
from tiny import tiny_recipe

from finetune.publishing import checks, parts, staging
from finetune.publishing.parts import Base
from finetune.recipe.load import Recipe


@pytest.mark.parametrize("name", ["README.md", "config.json", "tokenizer.json", "sub/notes.txt"])
def test_a_path_of_this_run_is_reported_with_its_line(name, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / name).write_text("one\ntwo /home/anna/llm three /home/anna")
    (line,) = checks.file_problems(tmp_path, ["/home/anna/llm", "/mnt/rows"])
    assert line.startswith(f"{name}:2: holds '/home/anna/llm'")
    assert checks.file_problems(tmp_path, ["/mnt/rows"]) == []


def test_the_paths_of_a_run_are_its_folder_its_data_and_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/anna"))
    paths = checks.private_paths(tmp_path, ["/mnt/rows/a.csv", "org/rows", "/data"])
    assert paths == sorted(["/home/anna", "/mnt/rows/a.csv", str(tmp_path)])


@pytest.mark.parametrize("name", ["model.bin", "x.pt", "x.pkl", "code.py", "archive.zip", "noname"])
def test_other_types_of_files_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    assert f"{name}: files of this type aren't published" in checks.file_problems(tmp_path, [])[0]


def test_licences_come_from_the_recipe_the_folder_or_are_asked_for(tmp_path):
    for folder, text in (("llm", "From: x\nLicence: Apache-2.0\n"), ("encoder", ""), ("data", "")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "NOTICE").write_text(text)
    (tmp_path / "data" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Rows\n")

    def recipe_with(**publish) -> Recipe:
        rows = {"path": str(tmp_path / "data" / "rows.csv"), "task": "classify"}
        recipe = tiny_recipe(tmp_path, data=[rows], publish=publish)
        return Recipe.without_files(json.loads(recipe.read_text()))

    recipe = recipe_with()
    bases = parts.with_licences(parts.bases_of(recipe, {}), {})
    assert [base.licence for base in bases] == ["apache-2.0", None]
    data = parts.data_licences(recipe)
    assert data == {"rows.csv": "cc-by-4.0"}
    (line,) = checks.licence_problems(bases, data, Path("recipe.yaml"))
    assert "licence of encoders.image" in line
    assert "`licenses: {encoders.image: ...}` under `publish` in recipe.yaml" in line
    licences = {"encoders.image": "mit", "data": "cc0-1.0"}
    assert [base.licence for base in parts.with_licences(bases, licences)] == ["apache-2.0", "mit"]
    assert parts.data_licences(recipe_with(licenses=licences)) == {"rows.csv": "cc0-1.0"}


def test_licences_on_the_hub_are_read_from_the_cards(monkeypatch, tmp_path):
    rows = {"path": "org/rows", "format": "hub", "task": "classify"}
    recipe = Recipe.without_files(json.loads(tiny_recipe(tmp_path, data=[rows]).read_text()))
    bases = [Base("llm", "org/llm", "org/llm", None), Base("encoders.image", "org/none", "org/none", None)]
    with hub_on_loopback() as hub, asked_of(hub, monkeypatch, tmp_path / "cache"):
        for name, licence in {"org/llm": "mit", "org/rows": "cc0-1.0"}.items():
            hub.add(name, {"README.md": f"---\nlicense: {licence}\n---\n".encode()})
        assert [base.licence for base in parts.with_licences(bases, {})] == ["mit", None]
        assert parts.data_licences(recipe) == {"org/rows": "cc0-1.0"}


def test_a_folder_is_a_base_for_merged_models_only():
    bases = [Base("llm", "/somewhere/llm", None, None), Base("encoders.image", "org/vit", "org/vit", None)]
    (line,) = checks.base_problems(bases, merged=False, recipe=Path("recipe.yaml"))
    assert "llm: llm is a local folder" in line and "hub_names" in line and "merged=True" in line
    assert checks.base_problems(bases, merged=True, recipe=Path("recipe.yaml")) == []


def test_names_of_this_machine_are_cleaned_wherever_they_stand(tmp_path):
    bases = [Base("llm", "/somewhere/llm", "org/llm", "c" * 40), Base("encoders.image", "/there/vit", None, None)]
    source, into = tmp_path / "source", tmp_path / "into"
    (source / "deep").mkdir(parents=True)
    into.mkdir()
    value = {"a": [{"_name_or_path": "/somewhere/llm"}, "/there/vit"], "b": str(tmp_path), "c": "/not/there", "d": 1}
    (source / "deep" / "config.json").write_text(json.dumps(value))
    (source / "same.json").write_text('{"x":   1}')
    assert staging.copy_cleaned(source, into, bases) == ["deep/config.json"]
    found = json.loads((into / "deep" / "config.json").read_text())
    assert found == {"a": [{"_name_or_path": "org/llm"}, "vit"], "b": tmp_path.name, "c": "/not/there", "d": 1}
    assert (into / "same.json").read_text() == '{"x":   1}'
    assert json.loads((source / "deep" / "config.json").read_text()) == value
