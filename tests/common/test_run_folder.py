import json
import shutil
import struct

import filelock
import pytest

from finetune.common.errors import ArtifactError, RecipeError, TrainingError, options_as_flags
from finetune.common.run_folder import RunFolder, of_another_version, refuse_several_processes


def test_a_run_that_stopped_before_its_first_step_may_begin_again(tmp_path):
    folder = RunFolder.create(tmp_path, "name: first\n", resume=False)
    (tmp_path / "versions.json").touch()
    folder.data.mkdir()
    (folder.data / "held_out.json").touch()  # of rows that may have been mended since
    RunFolder.create(tmp_path, "name: mended\n", resume=False)
    assert folder.recipe.read_text(encoding="utf-8") == "name: mended\n" and not folder.data.exists()


def test_one_process_at_a_time_trains_a_run(tmp_path):
    message = f"{tmp_path}/a/b/run: another process is training it: wait, stop that one, or choose another run="
    with RunFolder(tmp_path / "a" / "b" / "run").locked():
        with pytest.raises(TrainingError) as refused, RunFolder(tmp_path / "a" / "b" / "run").locked():
            pass
        assert str(refused.value) == message and not (tmp_path / "a" / "b" / "run").exists()
    with RunFolder(tmp_path / "run").locked(), RunFolder(tmp_path / "other").locked():
        pass
    with RunFolder(tmp_path / "run").locked():
        pass


@pytest.mark.parametrize("name", ["data", "checkpoints", "metrics.json", "notes.txt"])
def test_a_run_with_anything_more_is_left_alone(tmp_path, name):
    folder = RunFolder.create(tmp_path, "name: first\n", resume=False)
    (tmp_path / name).mkdir()
    with pytest.raises(TrainingError, match="resume=True"):
        RunFolder.create(tmp_path, "name: second\n", resume=False)
    assert folder.recipe.read_text(encoding="utf-8") == "name: first\n"


def finished(folder):
    run = RunFolder.create(folder, "name: first\n", resume=False)
    (folder / "versions.json").touch()
    for name in ("data", "checkpoints", "merged.partial"):
        (folder / name).mkdir()
        (folder / name / "file").touch()
    (folder / "metrics.json").touch()
    return run


def test_a_run_is_overwritten(tmp_path):
    finished(tmp_path / "run")
    run = RunFolder.create(tmp_path / "run", "name: second\n", resume=False, overwrite=True)
    assert run.recipe.read_text(encoding="utf-8") == "name: second\n"
    assert [path.name for path in run.path.iterdir()] == ["recipe.yaml"]


def test_overwriting_follows_no_link(tmp_path):
    finished(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    (tmp_path / "run" / "exports").symlink_to(tmp_path / "elsewhere")
    RunFolder.create(tmp_path / "run", "name: second\n", resume=False, overwrite=True)
    assert (tmp_path / "elsewhere" / "file").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "notes.txt").touch(),
        lambda folder: (folder / "thesis.old").touch(),
        lambda folder: (folder / "notes.partial").mkdir(),
        lambda folder: (folder / "versions.json").unlink(),  # a project with recipe.yaml and data/
        lambda folder: (folder / "recipe.yaml").unlink(),
    ],
)
def test_what_is_no_run_is_not_overwritten(spoil, tmp_path):
    finished(tmp_path)
    spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(TrainingError, match="overwrite=True removes only what a run has written"):
        RunFolder.create(tmp_path, "name: second\n", resume=False, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_is_not_overwritten(tmp_path):
    (tmp_path / "run").write_text("kept")
    with pytest.raises(TrainingError, match="something else"):
        RunFolder.create(tmp_path / "run", "name: second\n", resume=False, overwrite=True)
    assert (tmp_path / "run").read_text() == "kept"


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_is_no_run(resume, tmp_path):
    (tmp_path / "run").write_text("kept")
    with pytest.raises(TrainingError, match="a file, where a run is a folder; choose another run="):
        RunFolder.create(tmp_path / "run", "name: first\n", resume=resume)
    assert (tmp_path / "run").read_text() == "kept"


def test_this_folder_is_locked(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    with RunFolder(".").locked(), pytest.raises(TrainingError), RunFolder(tmp_path / "run").locked():
        pass


@pytest.mark.parametrize("error", [OSError("no locks on this drive"), NotImplementedError("none")])
def test_where_the_drive_has_no_locks_a_run_says_so_and_goes_on(error, tmp_path, monkeypatch, capsys):
    def acquire(*_, **__):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with RunFolder(tmp_path / "run").locked():
        pass
    message = f"run: no lock here ({error}): make sure that no other process trains this run"
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_what_tells_that_it_is_a_run_is_removed_last(tmp_path, monkeypatch):
    finished(tmp_path)
    (tmp_path / "tensorboard").mkdir()
    remove = shutil.rmtree

    def interrupted(path):
        if path.name == "tensorboard":
            raise KeyboardInterrupt
        remove(path)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", interrupted)
        RunFolder.create(tmp_path, "name: second\n", resume=False, overwrite=True)
    RunFolder.create(tmp_path, "name: second\n", resume=False, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_to_go_on_and_to_overwrite_exclude_each_other(tmp_path):
    finished(tmp_path)
    with pytest.raises(RecipeError, match="overwrite=True"):
        RunFolder.create(tmp_path, "name: first\n", resume=True, overwrite=True)
    assert (tmp_path / "metrics.json").exists()


def resumed(folder, before, now):
    (folder / "recipe.yaml").write_text(before)
    return RunFolder.create(folder, now, resume=True)


def test_a_changed_recipe_is_resumed_only_as_it_was_and_the_keys_are_named(tmp_path):
    before = "model:\n  frames: 4\n  off: no\ndata: [{path: a, head: c}]\n"
    with pytest.raises(TrainingError) as raised:
        resumed(tmp_path, before, "model:\n  frames: 8\n  off: no\ndata: [{path: a, group: b}]\n")
    assert str(raised.value) == (
        f"{tmp_path}: the recipe isn't the one that this run began with (model.frames: 4 there, 8 here; data.0.head: "
        "c there, nothing here; data.0.group: nothing there, b here); resume with the same recipe and overrides=, or "
        "choose another run="
    )
    assert (tmp_path / "recipe.yaml").read_text() == before and not (tmp_path / "data").exists()
    with (
        options_as_flags(),
        pytest.raises(TrainingError, match="recipe and --set, or choose another --run DIR"),
    ):
        RunFolder.create(tmp_path, "", resume=True)


@pytest.mark.parametrize("count, more", [(4, ")"), (5, "; 1 more)"), (7, "; 3 more)")])
def test_of_many_changes_four_are_named(count, more, tmp_path):
    keys = "abcdefg"[:count]
    with pytest.raises(TrainingError) as raised:
        resumed(tmp_path, "".join(f"{key}: 1\n" for key in keys), "".join(f"{key}: 2\n" for key in keys))
    assert f"d: 1 there, 2 here{more}; resume with" in str(raised.value)


def test_what_may_change_is_noted_with_each_resume(tmp_path, capsys):
    resumed(tmp_path, "train: {workers: 1}\n", "train: {workers: 2}\n")
    run = RunFolder.create(tmp_path, "train: {workers: 2, skip_bad_rows: yes}\n", resume=True)
    assert run.recipe.read_text() == "train: {workers: 2, skip_bad_rows: yes}\n"
    assert [json.loads(line) for line in (run.data / "changes.jsonl").read_text().splitlines()] == [
        {"key": "train.workers", "before": "1", "now": "2"},
        {"key": "train.skip_bad_rows", "before": "nothing", "now": "yes"},
    ]
    assert capsys.readouterr().err.splitlines() == [
        "from here on: train.workers is 2, was 1",
        "from here on: train.skip_bad_rows is yes, was nothing",
    ]


def test_a_run_that_is_not_there_yet_is_made_by_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without runs of its own
    with pytest.raises(ArtifactError) as missing:
        RunFolder.open(tmp_path / "asr")
    assert str(missing.value) == f"{tmp_path}/asr: no such run or folder; `finetune run RECIPE` makes one"


@pytest.mark.parametrize("count, more", [(7, ""), (8, ", ...")])
def test_runs_that_are_there_are_named(count, more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["runs/mine", *(f"{tmp_path}/other/{number}" for number in range(count))]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "recipe.yaml").touch()
    (tmp_path / "other" / "no run").mkdir()
    with pytest.raises(ArtifactError) as missing:
        RunFolder.open(tmp_path / "other" / "asr")
    assert str(missing.value).endswith(f"no such run or folder; there are: {', '.join(sorted(names)[:8])}{more}")


def test_a_part_that_is_missing_is_named_with_the_command_that_makes_it(tmp_path):
    made = {"recipe": "train", "adapter": "train", "metrics": "evaluate", "merged": "merge"}
    for part, command in made.items():
        with pytest.raises(ArtifactError) as missing:
            RunFolder.open(tmp_path, needs=part)
        path = getattr(RunFolder(tmp_path), part)
        reason = f"not a run folder, or `finetune {command}` hasn't finished"
        if part == "adapter":  # beside its recipe: the run began
            again = f"finetune.train('{tmp_path}/recipe.yaml', '{tmp_path}', resume=True)"
            reason = f"its training hasn't finished; {again} goes on with it"
        assert str(missing.value) == f"{tmp_path}: no {path.name} here: {reason}"
        path.touch()
    assert RunFolder.open(str(tmp_path)).path == RunFolder.open(RunFolder(tmp_path), needs="merged").path == tmp_path


@pytest.mark.parametrize(
    "name, made", [("a.yaml", "; `finetune run {} makes one"), ("a.yml", "; `finetune run {} makes one"), ("a.txt", "")]
)
def test_a_recipe_is_no_run(name, made, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(ArtifactError) as refused:
        RunFolder.open(tmp_path / name)
    made = made.format(f"{tmp_path / name}`")
    assert str(refused.value) == f"{tmp_path / name}: a file, where the folder of a run is needed{made}"


def test_a_run_is_a_path():
    with pytest.raises(ArtifactError) as refused:
        RunFolder.open(3)
    assert str(refused.value) == "run: a int; give a run folder's path, or a finetune.RunFolder"


def test_a_run_shows_what_it_has(tmp_path):
    run = RunFolder(tmp_path)
    assert repr(run) == f"RunFolder('{tmp_path}'): nothing yet"
    names = {"recipe": "recipe.yaml", "metrics": "metrics.json", "predictions": "predictions.jsonl"}
    names |= {"certificate": "certificate.json", "report": "report.html"}
    for name in names.values():
        (tmp_path / name).touch()
    for name in ("adapter", "merged", "plots"):
        (tmp_path / name).mkdir()
    header = bytes(16) + struct.pack(">I", 300)
    (tmp_path / "plots" / "b.png").write_bytes(header)
    (tmp_path / "plots" / "a.png").write_bytes(header)
    (tmp_path / "plots" / "c.txt").touch()
    in_order = "recipe, adapter, metrics, predictions, merged, certificate, report"
    assert repr(run) == f"RunFolder('{tmp_path}'): {in_order}"
    html = run._repr_html_()
    assert html.startswith(f'<h4>Run {tmp_path.name}</h4><img alt="a"') and html.count("<img") == 2
    for name, file in {**names, "adapter": "adapter", "merged": "merged"}.items():
        assert f'>{name}</td><td style="text-align: left">{tmp_path / file}</td>' in html


def test_sections_of_metrics_are_merged_one_level_deep(tmp_path):
    run = RunFolder(tmp_path)
    assert run.read_metrics() == {}
    run.update_metrics(train={"seconds": 1, "loss": [3, 2]}, evaluate={"f1": 0.5})
    run.update_metrics(train={"seconds": 2})
    content = {"train": {"seconds": 2, "loss": [3, 2]}, "evaluate": {"f1": 0.5}}
    assert run.read_metrics() == json.loads((tmp_path / "metrics.json").read_text()) == content


def test_checkpoints_are_the_whole_ones_newest_first(tmp_path):
    run, stage = RunFolder(tmp_path), tmp_path / "checkpoints" / "tune"
    assert run.checkpoints_of("tune") == []
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-9", "checkpoint-11.partial", "checkpoint-9.old", "best"):
        (stage / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "align" / "checkpoint-20").mkdir(parents=True)
    assert [path.name for path in run.checkpoints_of("tune")] == ["checkpoint-10", "checkpoint-9", "checkpoint-2"]
    run.remove_torn("tune")
    names = {path.name for path in stage.iterdir()}
    assert names == {"checkpoint-2", "checkpoint-10", "checkpoint-9", "checkpoint-9.old", "best"}
    (stage / "final").mkdir()
    assert run.checkpoints_of("tune") == [stage / "final"]


def test_rows_elsewhere_have_a_folder_of_their_own(tmp_path):
    rows = tmp_path / "new.rows.csv"
    assert RunFolder(tmp_path).evaluation_of(rows) == tmp_path / "evaluations" / "new.rows"


def test_a_run_of_another_version_says_so(tmp_path):
    from finetune.common.version import VERSION

    assert of_another_version(tmp_path) == ""
    for content in ({}, {"finetune-kit": VERSION}, []):
        (tmp_path / "versions.json").write_text(json.dumps(content))
        assert of_another_version(tmp_path) == ""
    (tmp_path / "versions.json").write_text('{"finetune-kit": "0.0.9"}')
    assert of_another_version(tmp_path) == (
        f" (the run is of finetune-kit 0.0.9, this is {VERSION}: use that version, or train anew)"
    )
    with pytest.raises(TrainingError) as raised:
        resumed(tmp_path, "a: 1\n", "a: 2\n")
    assert str(raised.value).endswith(f"or choose another run={of_another_version(tmp_path)}")


def test_only_training_works_in_several_processes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    refuse_several_processes("merge")
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_several_processes("merge")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError) as refused:
        refuse_several_processes("merge")
    assert str(refused.value) == "merge is for one process, not 2: launch `finetune train`, then merge alone"
