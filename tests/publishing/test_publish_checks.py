"""What must not be published is found, and what only looks like it isn't."""

import getpass
import json

import pytest
import torch
from safetensors.torch import save_file

from finetune.publishing import checks, parts, staging
from finetune.publishing.parts import Base

SECRETS = [
    "hf_" + "a" * 34,
    "sk-" + "proj-" + "b" * 40,
    "AKIA" + "C" * 16,
    "ghp_" + "d" * 36,
    "AIza" + "e" * 35,
    "glpat-" + "f" * 20,
    "npm_" + "g" * 36,
    "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxIn0." + "h" * 43,
    "xoxb-" + "1" * 12,
    "-----BEGIN RSA PRIVATE KEY-----",
]
PATHS = [
    *("/home/anna/data", "/Users/anna/x.csv", "/root/runs", "/tmp/run", "/data/anna/llm", "/work/llm", "/gpfs/users/x"),
    *("/content/drive/MyDrive/x", "/Volumes/anna/x", "/media/anna/x", "/workspaces/x", "~/models/anna"),
    *("file:///home/anna/x", "file:/elsewhere/x", "file://localhost/x"),
    *(r"C:\Users\anna", r"C:\\Users\\anna", "C:/Users/anna/models", r"\\server\share\anna"),
]
HARMLESS = [
    "https://huggingface.co/home/anna and a/home/b",
    "and/or, 3/4, s/he, sk-learn, hf_hub_download, hf_xet, AKIA, /usr, / home",
    "the mark /answers/ and </s>",
    "https://example.org/data/x, s3://bucket/work/x, gs://data/x, data/rows.csv, ./data/x, ../work/x, **/data/*.csv",
    "text/content, {{ root }}/data/x, ~/.cache, ~5 of 6, https://example.org/~/x and #/data/x",
    r"\frac{a}{b} \\alpha, \s+\d{1,3}|\\n, Q:\nA:\n, the profile: /x",
    "eyJhbGciOiJIUzI1NiJ9 alone, npm_config_cache, glpat-",
]
USERS = ["trained by anna", '{"author": "anna"}', "user=anna", "anna@host", "/nfs-7/people/anna/x", "/hpc/anna"]
HARMLESS_USERS = [
    'https://huggingface.co/anna/x and model = load("anna/products"), by anna/products',
    "anna is a girl's name, <anna></anna>, annabel, by annabel, by Anna, savanna@host",
    '{"anna": 1}',
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "sub/notes.txt"])
def test_a_secret_is_found_and_not_repeated(secret, name, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / name).write_text(f"one\ntwo {secret} three")
    (line,) = checks.file_problems(tmp_path, [])
    assert line.startswith(f"{name}:2: holds a") and secret not in line


@pytest.mark.parametrize("path", PATHS)
def test_a_path_of_a_person_is_found(path, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"name": path}))
    assert "names a path of this machine" in checks.file_problems(tmp_path, [])[0]


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_it_is_let_through(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert checks.file_problems(tmp_path, ["/work/somewhere"]) == []


@pytest.mark.parametrize("suffix", ["json", "md"])
def test_a_path_is_found_however_it_is_written(suffix, tmp_path):
    (tmp_path / f"x.{suffix}").write_text(
        r'{"x": "\/home\/anna\/x"}' if suffix == "json" else r"at \\server\Users\anna."
    )
    assert "names a path of this machine" in checks.file_problems(tmp_path, [])[0]


@pytest.mark.parametrize("text", USERS + HARMLESS_USERS)
def test_a_word_is_a_user_where_it_stands_as_one(text, tmp_path, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "anna")
    (tmp_path / "notes.txt").write_text(text)
    lines = checks.file_problems(tmp_path, [])
    assert ["names 'anna', who is logged in here" in line for line in lines] == [True] * (text in USERS)


def test_words_of_a_vocabulary_are_no_paths_but_those_of_this_run_are(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"/home/user": 1, "/tmp/x": 2}))
    assert checks.file_problems(tmp_path, []) == []
    assert "'/home/user'" in checks.file_problems(tmp_path, ["/home/user"])[0]


def test_metadata_of_weights_and_users_are_read_too(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", {"from": "/home/anna/llm"})
    (tmp_path / "notes.txt").write_text(f"ask {getpass.getuser()}@host")
    told = "\n".join(checks.file_problems(tmp_path, []))
    assert "model.safetensors:1: names a path" in told and f"names {getpass.getuser()!r}" in told


@pytest.mark.parametrize("name", ["model.bin", "x.pt", "x.pkl", "code.py", "archive.zip", "noname"])
def test_other_types_of_files_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    assert f"{name}: files of this type aren't published" in checks.file_problems(tmp_path, [])[0]


def test_licences_come_from_the_recipe_the_folder_or_are_asked_for(tmp_path):
    for folder, text in (("llm", "From: x\nLicence: Apache-2.0\n"), ("encoder", ""), ("data", "")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "NOTICE").write_text(text)
    (tmp_path / "data" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Rows\n")
    recipe = {
        "model": {"llm": {"name": str(tmp_path / "llm")}, "encoders": {"image": {"name": str(tmp_path / "encoder")}}},
        "data": [{"path": str(tmp_path / "data" / "rows.csv")}],
    }
    bases = parts.with_licences(parts.bases_of(recipe, {}, {}), {})
    assert [base.licence for base in bases] == ["apache-2.0", None]
    data = parts.data_licences(recipe, {})
    assert data == {"rows.csv": "cc-by-4.0"}
    (line,) = checks.licence_problems(bases, data, "recipe.yaml")
    assert "licence of encoders.image" in line and "publish.licenses {encoders.image: ...} in recipe.yaml" in line
    named = {"encoders.image": "mit", "data": "cc0-1.0"}
    assert [base.licence for base in parts.with_licences(bases, named)] == ["apache-2.0", "mit"]
    assert parts.data_licences(recipe, named) == {"rows.csv": "cc0-1.0"}


def test_a_folder_is_a_base_for_merged_models_only():
    bases = [Base("llm", "/somewhere/llm", None, None), Base("encoders.image", "org/vit", "org/vit", None)]
    (line,) = checks.base_problems(bases, merged=False, recipe="recipe.yaml")
    assert "llm: llm is a folder of this machine" in line and "hub_names" in line and "--merged" in line
    assert checks.base_problems(bases, merged=True, recipe="recipe.yaml") == []


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
