"""A folder full of mistakes: each is found, the cleaned copy has none that stops training."""

import base64
import csv
import json
import shutil
from pathlib import Path

import pytest
from cli import cli
from tiny import tiny_picture, tiny_recipe

import finetune
from finetune.commands._reader import Reader
from finetune.common.errors import DataError, ModelError
from finetune.data import sample
from finetune.data.rows import read_splits

BROKEN = {  # a row of train.csv -> what is found in it
    "no/such.png,red": "medium",
    "images/torn.png,red": "medium",
    "images/train1.png,": "row",
    ",": "empty",
    "images/train0.png,red,more": "unreadable",
    "images/test0.png,red": "leak_row",
    "images/test1.png,blue": "leak_medium",
    "images/train2.png,blue": "identical",
    "images/grey.png,yellow": "blank",
    "images/train3.png,caf\ufffd": "encoding",
}
QUARANTINED = {"medium", "row", "empty", "unreadable", "leak_row", "leak_medium", "identical"}


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """(recipe, {line: what is wrong there})"""
    folder = tmp_path_factory.mktemp("messy")
    recipe = tiny_recipe(folder)
    data = folder / "data"
    images = data / "images"
    (images / "torn.png").write_bytes((images / "train0.png").read_bytes()[:60])
    tiny_picture((127, 127, 127)).save(images / "grey.png")
    with (data / "train.csv").open(encoding="utf-8", newline="") as file:
        first = len(file.readlines()) + 1
    with (data / "train.csv").open("a", encoding="utf-8") as file:
        file.writelines(f"{row}\n" for row in BROKEN)
    return recipe, dict(zip(range(first, first + len(BROKEN)), BROKEN.values(), strict=True))


@pytest.fixture(scope="module")
def checked(messy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checked")
    return finetune.data_check(messy[0], out=folder / "report", fix=folder / "fixed", workers=0)


def test_each_mistake_is_found_in_its_row(messy, checked):
    report = json.loads(checked.json.read_text(encoding="utf-8"))
    found = {(entry["line"], entry["code"]) for entry in report["list"] if entry["file"] == "train.csv"}
    assert found >= set(messy[1].items())
    errors = [entry for entry in report["list"] if entry["severity"] == "error"]
    assert {entry["line"] for entry in errors} == {
        line for line, code in messy[1].items() if code in ("medium", "row", "empty", "unreadable", "leak_row")
    }
    assert checked.errors == len(errors) == 6 and checked.summary["rows"] == 12 + 9 + 8


def test_what_training_refuses_is_an_error_and_the_copy_has_none(messy, checked):
    loaded = finetune.load_recipe(messy[0])
    with pytest.raises(DataError):
        read_splits(loaded.data, loaded.seed)
    fixed = finetune.load_recipe(checked.fixed.recipe)
    splits = read_splits(fixed.data, fixed.seed)
    left_out = sum(code in QUARANTINED for code in messy[1].values())
    assert len(splits.train) == 12 + len(BROKEN) - left_out and len(splits.test) == 8
    again = finetune.data_check(checked.fixed.recipe, out=checked.json.parent / "again", workers=0)
    assert again.errors == 0 and {"leak_medium", "identical"}.isdisjoint(again.summary["findings"])


def test_the_quarantine_says_what_was_left_out_and_why(messy, checked):
    lines = (checked.fixed.recipe.parent / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    left_out = {entry["row"]: entry for entry in map(json.loads, lines)}
    assert set(left_out) == {line for line, code in messy[1].items() if code in QUARANTINED}
    assert all(entry["file"] == "train.csv" and entry["reasons"] for entry in left_out.values())
    by_code = {code: line for line, code in messy[1].items()}
    assert left_out[by_code["leak_row"]]["columns"] == {"image": "images/test0.png", "label": "red"}
    assert left_out[by_code["unreadable"]]["columns"] == {"line": "images/train0.png,red,more"}


def test_nothing_is_changed_in_place_and_a_second_time_gives_the_same_bytes(messy, checked):
    before = (messy[0].parent / "data" / "train.csv").read_bytes()
    folder = checked.fixed.recipe.parent
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    finetune.data_check(messy[0], out=folder.parent / "report", fix=folder, workers=0)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    assert (messy[0].parent / "data" / "train.csv").read_bytes() == before


def test_media_can_be_copied_too(messy, tmp_path):
    result = finetune.data_check(messy[0], out=tmp_path / "r", fix=tmp_path / "fixed", copy_media=True, workers=0)
    moved = shutil.move(tmp_path / "fixed", tmp_path / "elsewhere")
    fixed = finetune.load_recipe(Path(moved) / "recipe.yaml")
    splits = read_splits(fixed.data, fixed.seed)
    assert len([*splits.train, *splits.validation, *splits.test]) == result.fixed.rows
    assert all(medium.path.is_relative_to(moved) for sample in splits.train for medium in sample.media)


RECIPE = """\
# my own words
name: tiny   # a name
model:
  llm: {name: llm, quantize: none}  # small
  encoders:
    image: {kind: vision, name: "encoder"}
  projectors: {image: pixel_shuffle}
data:
  # products
  - task: classify
    path: data/train.csv   # photographed
  - {path: 'data/test.csv', split: test, task: classify}
train:
  stages:
    - {name: align, trains: [projectors], learning_rate: 1.0e-3}
"""


def test_the_copy_has_the_users_own_recipe_with_other_paths_and_exits_with_0(messy, tmp_path):
    """Comments and order stay; the copy reads from anywhere."""
    folder = messy[0].parent
    (folder / "own.yaml").write_text(RECIPE, encoding="utf-8")
    done = cli("data", "check", folder / "own.yaml", "--fix", tmp_path / "fixed", "--workers", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "fixed" / "recipe.yaml").read_text(encoding="utf-8")
    expected = RECIPE.replace("name: llm,", f"name: {folder}/llm,").replace('"encoder"', f"{folder}/encoder")
    expected = expected.replace("  - task: classify", f"  - media_folder: {folder}/data\n    task: classify")
    expected = expected.replace("data/train.csv ", "rows-0.csv ")
    expected = expected.replace("{path: 'data/test.csv'", f"{{media_folder: {folder}/data, path: rows-1.csv")
    assert text == expected
    assert len(finetune.load_recipe(tmp_path / "fixed" / "recipe.yaml").data) == 2
    done = cli("data", "check", folder / "own.yaml", "--workers", "0", cwd=tmp_path)
    assert done.returncode == 2


def test_a_folder_of_something_else_is_not_overwritten(messy, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="something else"):
        finetune.data_check(messy[0], fix=tmp_path, out=tmp_path / "r", workers=0)
    other = tmp_path / "other"
    other.mkdir()
    (other / "quarantine.jsonl").touch()
    (other / "recipe.yaml").write_text("name: another\n")
    with pytest.raises(DataError, match="for another recipe"):
        finetune.data_check(messy[0], fix=other, out=tmp_path / "r", workers=0)
    with pytest.raises(DataError, match=r"lie in it|something else"):
        finetune.data_check(messy[0], fix=messy[0].parent / "data", out=tmp_path / "r", workers=0)


@pytest.mark.slow
def test_processes_find_what_one_finds(messy, checked, tmp_path):
    result = finetune.data_check(messy[0], out=tmp_path, workers=2)
    assert result.json.read_bytes() == checked.json.read_bytes()


def test_a_page_holds_all_it_shows(checked):
    text = checked.html.read_text(encoding="utf-8")
    assert "data:image/jpeg;base64," in text and "train.csv:" in text
    assert "http://" not in text and "https://" not in text and 'src="data:' in text


def test_too_many_tokens(messy, tmp_path):
    result = finetune.data_check(messy[0], ["train.tokens_per_batch=16"], out=tmp_path, workers=0)
    recipe = finetune.load_recipe(messy[0])
    reader = Reader(recipe)
    held_out = [source for source in recipe.data if source.split == "test"]
    lengths = [len(reader.tokens(sample, sample.source).input_ids) for sample in read_splits(held_out, 0).test]
    assert min(lengths) > 16 and result.summary["findings"]["long"] == result.summary["splits"]["train"]["rows"]


def test_rows_are_held_out_as_training_holds_them_out(messy, checked, tmp_path):
    overrides = ["data.0.hold_out=0.3", "data.0.hold_out_validation=0.2"]
    fixed = checked.fixed.recipe
    result = finetune.data_check(fixed, overrides, out=tmp_path, workers=0)
    loaded = finetune.load_recipe(fixed, overrides)
    splits = read_splits(loaded.data, loaded.seed)
    expected = {split: len(splits.of(split)) for split in ("train", "validation", "test")}
    assert {split: counts["rows"] for split, counts in result.summary["splits"].items()} == expected
    assert expected["validation"] > 0 and expected["test"] > 8


def test_the_recipes_bound_of_embedded_media_holds_everywhere(tmp_path, monkeypatch):
    """Also behind a line that can't be read."""
    bounds = []
    real = sample.stored

    def spied(content, where, max_bytes):
        bounds.append(max_bytes)
        return real(content, where, max_bytes)

    monkeypatch.setattr(sample, "stored", spied)
    recipe = tiny_recipe(tmp_path, media={"max_bytes": 54321})
    tiny_picture().save(tmp_path / "a.png")
    picture = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    with (tmp_path / "data" / "train.csv").open("a", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([[picture, "red"], ["a.png", "red", "more"], [picture, "blue"]])
    overrides = ["data.0.hold_out=0.1"]
    finetune.data_check(recipe, overrides, out=tmp_path / "out", fix=tmp_path / "fixed", copy_media=True, workers=0)
    finetune.data_preview(recipe, overrides, rows=20)
    assert len(bounds) > 4 and {*bounds} == {54321}


def test_text_alone_and_an_llm_that_reads_little(tmp_path):
    recipe = tiny_recipe(tmp_path, model__encoders={}, model__projectors={}, data=[])
    content = json.loads(recipe.read_text())
    rows = [("Who?", "me"), ("What " * 200, "that"), ("Who?", "<|im_start|>"), ("One\rmore", "line")]
    for split in ("train", "test"):
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("question", "answer"), *((f"{split} {q}", a) for q, a in rows)])
    task = {"kind": "answer", "media": []}
    content["data"] = [{"path": f"{split}.csv", "task": task, "split": split} for split in ("train", "test")]
    content["train"]["stages"] = [{"name": "tune", "trains": ["adapter"], "learning_rate": 1.0e-3}]
    content["train"]["tokens_per_batch"] = 4096
    recipe.write_text(json.dumps(content))
    result = finetune.data_check(recipe, out=tmp_path / "out", fix=tmp_path / "fixed", workers=0)
    with min((tmp_path / "fixed").glob("*.csv")).open(encoding="utf-8", newline="") as file:
        assert [*csv.reader(file)][-1] == ["train One\rmore", "line"]
    assert result.summary["findings"]["context"] == 2 and result.summary["different_media"] == {}


def test_two_users_of_one_offer_are_two_rows(tmp_path):
    """Both users read the same question, one twice."""
    rows = [("u1", "red", 1), ("u2", "red", 1), ("u1", "blue", 0), ("u2", "green", 0), ("u2", "green", 0)]
    for split in ("train", "test"):
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            offers = [(f"{user}-{split}", offer, clicked) for user, offer, clicked in rows]
            csv.writer(file).writerows([("user", "item", "relevance"), *offers])
    task = {"kind": "rank", "text": ["item"], "group": "user"}
    sources = [{"path": str(tmp_path / f"{split}.csv"), "task": task, "split": split} for split in ("train", "test")]
    result = finetune.data_check(tiny_recipe(tmp_path, data=sources), out=tmp_path / "out", workers=0)
    assert result.summary["findings"] == {"identical": 2}


@pytest.mark.slow
def test_an_encoder_that_is_not_there_is_one_line(messy, tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        finetune.data_check(messy[0], ["model.encoders.image.name=nobody/nowhere"], out=tmp_path, workers=1)


def test_the_command_line(messy, checked, tmp_path):
    broken = cli("data", "check", messy[0], "--out", tmp_path)
    assert broken.returncode == 2 and "6 errors" in broken.stdout and "train.csv:" in broken.stdout
    assert "Traceback" not in broken.stderr
    assert cli("data", "check", checked.fixed.recipe, "--out", tmp_path).returncode == 0
