import pytest

from finetune.common.errors import TrainingError
from finetune.common.run_folder import RunFolder


def test_a_run_that_stopped_before_its_first_step_may_begin_again(tmp_path):
    folder = RunFolder.create(tmp_path, "name: first\n", resume=False)
    (tmp_path / "versions.json").touch()
    RunFolder.create(tmp_path, "name: mended\n", resume=False)
    assert folder.recipe.read_text(encoding="utf-8") == "name: mended\n"


@pytest.mark.parametrize("name", ["data", "checkpoints", "metrics.json", "notes.txt"])
def test_a_run_with_anything_more_is_left_alone(tmp_path, name):
    folder = RunFolder.create(tmp_path, "name: first\n", resume=False)
    (tmp_path / name).mkdir()
    with pytest.raises(TrainingError, match="--resume"):
        RunFolder.create(tmp_path, "name: second\n", resume=False)
    assert folder.recipe.read_text(encoding="utf-8") == "name: first\n"
