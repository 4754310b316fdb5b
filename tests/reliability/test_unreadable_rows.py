"""Training rows whose media can't be read: by default training stops and names all; with `train.skip_bad_rows` it uses
exactly the good ones, counts and lists the others, and does the same after a resume.
"""

import csv
import json

import pytest
import torch
from accelerate import PartialState
from cli import cli
from safetensors.torch import load_file
from tiny import tiny_dataset, tiny_recipe

from finetune.common.errors import TrainingError
from finetune.common.run_folder import RunFolder
from finetune.recipe.load import load_recipe
from finetune.training import run_stage
from finetune.training.prepare import prepare

pytestmark = pytest.mark.slow
ROWS, BAD = 32, 24
SKIP = ("--set", "train.skip_bad_rows=true")


@pytest.fixture
def project(tmp_path):
    """A recipe most of whose training pictures are no pictures, and which these are."""
    tiny_dataset(tmp_path / "data", train=ROWS)
    bad = [number for number in range(ROWS) if number % 4][:BAD]
    for number in bad:
        (tmp_path / "data" / "images" / f"train{number}.png").write_text(f"no picture {number}")
    return tiny_recipe(tmp_path), [f"train.csv:{number + 2}" for number in bad]


def listed(run):
    return [json.loads(line) for line in (run / "data" / "unreadable.jsonl").read_text().splitlines()]


def adapter(run):
    return {file.name: load_file(file) for file in sorted((run / "adapter").glob("*.safetensors"))}


def test_training_stops_and_names_all(project, tmp_path):
    recipe, bad = project
    stopped = cli("train", recipe, "--run", "run", cwd=tmp_path)
    assert stopped.returncode == 2 and "Traceback" not in stopped.stderr
    message = " ".join(stopped.stderr.split())
    assert f"{BAD} of {ROWS} training rows can't be used" in message and "skip_bad_rows=true" in message
    assert f"... and {BAD - 20} more, all in" in message and "unreadable.jsonl" in message
    assert message.count("train.csv:") == 20
    assert [one["row"] for one in listed(tmp_path / "run")] == bad and not any(
        one["left_out"] for one in listed(tmp_path / "run")
    )
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.full
def test_a_run_that_stopped_goes_on_without_them(project, tmp_path):
    recipe, _ = project
    assert cli("train", recipe, "--run", "run", cwd=tmp_path).returncode == 2
    went_on = cli("train", recipe, "--run", "run", "--resume", *SKIP, cwd=tmp_path)
    assert went_on.returncode == 0 and f"{BAD} of {ROWS} training rows" in went_on.stdout + went_on.stderr
    assert all(one["left_out"] for one in listed(tmp_path / "run"))


def test_skipping_uses_exactly_the_good_rows_and_the_same_after_a_resume(project, tmp_path, monkeypatch, tried):
    recipe, bad = project
    with monkeypatch.context() as patch:
        whole, stages = run_stage.set_trainable, []

        def second_fails(*arguments):
            stages.append(arguments)
            if len(stages) == 2:
                raise TrainingError("interrupted")
            return whole(*arguments)

        patch.setattr(run_stage, "set_trainable", second_fails)
        assert cli("train", recipe, "--run", "run", *SKIP, cwd=tmp_path).returncode == 1
    resumed = cli("train", recipe, "--run", "run", "--resume", *SKIP, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    found = listed(tmp_path / "run")
    assert [one["row"] for one in found] == bad and all(
        one["left_out"] and "not a picture" in one["what"] for one in found
    )

    table = tmp_path / "data" / "train.csv"
    with table.open(newline="") as file:
        header, *rows = csv.reader(file)
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([header, *(row for n, row in enumerate(rows) if f"train.csv:{n + 2}" not in bad)])
    assert cli("train", recipe, "--run", "good", cwd=tmp_path).returncode == 0
    assert not (tmp_path / "good" / "data" / "unreadable.jsonl").exists()
    mine, clean = adapter(tmp_path / "run"), adapter(tmp_path / "good")
    assert mine.keys() == clean.keys() and mine
    for name, tensors in mine.items():
        assert all(torch.equal(value, clean[name][key]) for key, value in tensors.items())
    assert json.loads((tmp_path / "run" / "data" / "summary.json").read_text())["train"]["rows"] == ROWS - BAD
    tried(
        f"{BAD} of {ROWS} rows with pictures that are none",
        "left out, listed, the same after a resume; weights of the good rows alone",
    )


def test_rows_that_are_scored_are_never_left_out(tmp_path):
    tiny_dataset(tmp_path / "data")
    recipe = tiny_recipe(tmp_path, train__validation={"every_n_steps": 4}, train__skip_bad_rows=True)
    text = json.loads(recipe.read_text())
    text["data"].append(text["data"][1] | {"split": "validation", "path": str(tmp_path / "data" / "scored.csv")})
    recipe.write_text(json.dumps(text))
    (tmp_path / "data" / "no.png").write_text("no picture")
    (tmp_path / "data" / "scored.csv").write_text("image,label\nno.png,red\n")
    stopped = cli("train", recipe, "--run", "run", cwd=tmp_path)
    message = " ".join(stopped.stderr.split())
    assert stopped.returncode == 2 and "scored.csv:2" in message and "rows to score are never left out" in message
    assert "skip_bad_rows=true" not in message
    assert [(one["row"], one["left_out"]) for one in listed(tmp_path / "run")] == [("scored.csv:2", False)]


def test_rows_of_two_sources_are_counted_apart(project, tmp_path):
    """Each row by its own place, where files have the same name and pictures."""
    recipe, bad = project
    content = json.loads(recipe.read_text())
    content["data"].append(content["data"][0] | {"task": {"kind": "classify", "prompt": "Which colour?"}})
    recipe.write_text(json.dumps(content))
    stopped = cli("train", recipe, "--run", "run", cwd=tmp_path)
    assert f"{2 * BAD} of {2 * ROWS} training rows can't be used" in " ".join(stopped.stderr.split())
    rows = listed(tmp_path / "run")
    assert [one["row"] for one in rows] == [*bad, *bad] and not any("train.csv" in one["what"] for one in rows)


def test_several_processes_are_refused_before_anything_is_encoded(project, tmp_path, monkeypatch):
    recipe, _ = project
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
    with pytest.raises(TrainingError, match="skip_bad_rows: only for one process"):
        prepare(RunFolder(tmp_path / "run"), load_recipe(recipe, ["train.skip_bad_rows=true"]))


def test_training_stops_where_a_stage_has_no_row_left(tmp_path):
    tiny_dataset(tmp_path / "data", train=8)
    for number in range(8):
        (tmp_path / "data" / "images" / f"train{number}.png").write_text(f"no picture {number}")
    stopped = cli("train", tiny_recipe(tmp_path), "--run", "run", *SKIP, cwd=tmp_path)
    message = " ".join(stopped.stderr.split())
    assert stopped.returncode == 2 and "8 of 8 training rows can't be used" in message
    assert "without them stage 'align' has no row" in message
