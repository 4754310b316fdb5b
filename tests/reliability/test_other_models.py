"""A run goes on over the models that it began with, and a run of another version says so."""

import pytest
from safetensors.torch import load_file, save_file
from trained_runs import change_json, copy_of, project_copy

import finetune
from finetune.common.errors import FinetuneError, TrainingError
from finetune.common.run_folder import RunFolder
from finetune.training import began
from finetune.training.began import model_files, refuse_other_models, sampled_hash

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("part", ["llm", "encoder"])
def test_a_changed_model_is_noticed_on_resume(part, finished_run, tmp_path, tried):
    run = project_copy(finished_run("plain"), tmp_path)
    recipe = finetune.load_recipe(tmp_path / "recipe.yaml")
    weights = tmp_path / part / "model.safetensors"
    content, tensors = weights.read_bytes(), load_file(weights)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[7] += 0.5
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(TrainingError, match=rf"{weights}: not what this run began with: .*overwrite=True"):
        finetune.train(recipe, run, resume=True)
    weights.write_bytes(content)
    refuse_other_models(RunFolder(run), dict(model_files(recipe)))  # as it was: welcome
    tried(f"one value of the {part} changed between two parts of a run", "refused before the first step, named")


def test_a_commit_of_the_hub_that_moved_is_noticed(tmp_path):
    folder = RunFolder(tmp_path)
    refuse_other_models(folder, {"a.safetensors": "1"})
    refuse_other_models(folder, {"the commit of org/llm": "aaa"})
    with pytest.raises(TrainingError, match="the commit of org/llm: not what this run began with"):
        refuse_other_models(folder, {"the commit of org/llm": "bbb"})


def test_a_large_file_is_hashed_by_parts_of_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(began, "BLOCK", 16)
    path, size = tmp_path / "large", 5000
    path.write_bytes(bytes(size))
    before = sampled_hash(path)
    for place in (0, 15, size - 16, size - 1, *((size - 16) * part // 63 for part in range(64))):
        path.write_bytes(bytes(place) + b"\1" + bytes(size - place - 1))
        assert sampled_hash(path) != before, place
    path.write_bytes(bytes(size + 1))
    assert sampled_hash(path) != before
    for small in (1, 17, 64 * 16):
        for place in range(0, small, 5):
            path.write_bytes(bytes(small))
            before = sampled_hash(path)
            path.write_bytes(bytes(place) + b"\1" + bytes(small - place - 1))
            assert sampled_hash(path) != before, (small, place)


@pytest.mark.parametrize("use", ["resume", "evaluate", "merge"])
def test_a_run_folder_of_another_version_says_so(use, finished_run, tmp_path, tried):
    plain = finished_run("plain")
    run = copy_of(plain, tmp_path)
    change_json(run / "versions.json", **{"finetune-kit": "9.1.0"})
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("\ntrain:\n", "\ntrain:\n  of_tomorrow: 1\n"))
    uses = {
        "resume": lambda: finetune.train(finetune.load_recipe(plain.parent / "recipe.yaml"), run, resume=True),
        "evaluate": lambda: finetune.evaluate(run),
        "merge": lambda: finetune.merge(run),
    }
    with pytest.raises(FinetuneError) as refused:
        uses[use]()
    assert "the run is of finetune-kit 9.1.0, this is " in str(refused.value)
    tried(f"{use} of a run folder of another version", "refused, with both versions")
