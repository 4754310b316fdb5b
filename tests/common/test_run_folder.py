import pytest

from finetune.common.errors import ArtifactError, RecipeError, TrainingError
from finetune.common.run_folder import RunFolder


def test_a_run_that_stopped_before_its_first_step_may_begin_again(tmp_path):
    folder = RunFolder.create(tmp_path, "name: first\n", resume=False)
    (tmp_path / "versions.json").touch()
    folder.data.mkdir()
    (folder.data / "held_out.json").touch()  # of rows that may have been mended since
    RunFolder.create(tmp_path, "name: mended\n", resume=False)
    assert folder.recipe.read_text(encoding="utf-8") == "name: mended\n" and not folder.data.exists()


def test_one_process_at_a_time_trains_a_run(tmp_path):
    with RunFolder(tmp_path / "run").locked():
        with pytest.raises(TrainingError, match="another process is training it"), RunFolder(tmp_path / "run").locked():
            pass
        with RunFolder(tmp_path / "other").locked():
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


def test_to_go_on_and_to_overwrite_exclude_each_other(tmp_path):
    finished(tmp_path)
    with pytest.raises(RecipeError, match="overwrite=True"):
        RunFolder.create(tmp_path, "name: first\n", resume=True, overwrite=True)
    assert (tmp_path / "metrics.json").exists()


def test_a_changed_recipe_is_resumed_only_as_it_was_and_the_keys_are_named(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model:\n  frames: 4\n  off: no\ndata: [{path: a}]\n")
    with pytest.raises(TrainingError) as raised:
        RunFolder.create(tmp_path, "model:\n  frames: 8\n  off: no\ndata: [{path: a, group: b}]\n", resume=True)
    assert "(model.frames: 4 there, 8 here; data.0.group: nothing there, b here); resume with" in str(raised.value)


def test_a_run_that_is_not_there_yet_is_made_by_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without runs of its own
    with pytest.raises(ArtifactError, match=r"no such run or folder; `finetune run RECIPE` makes one"):
        RunFolder.open(tmp_path / "asr")
