"""A certificate is of the adapter as it was trained, over the LLM that it was trained over."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from trained_runs import project_copy

import finetune
from finetune.common import run_folder
from finetune.common.certificate import read_certificate
from finetune.common.errors import ArtifactError, MergeRefused

pytestmark = pytest.mark.slow


@pytest.fixture
def run(finished_run, tmp_path):
    """A trained run in a project of its own, to be spoilt."""
    run = project_copy(finished_run("plain"), tmp_path)
    shutil.rmtree(run / "merged")
    return run


def change(path, key, value):
    text = path.read_text()
    assert key in text
    path.write_text(text.replace(key, value))


def spoil(path, how):
    save_file({name: how(name, tensor) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def test_what_the_recipe_says_by_now_changes_nothing(run):
    finetune.merge(run)
    before = read_certificate(run).sha256
    alpha = finetune.load_recipe(run / "recipe.yaml").adapter.alpha
    change(run / "recipe.yaml", f"alpha: {alpha}", f"alpha: {8 * alpha}")
    finetune.merge(run)
    assert read_certificate(run).sha256 == before


def test_another_base_under_the_same_name_is_named(run, tmp_path):
    assert list(read_certificate_of(run).language_model.sha256) == ["model.safetensors"]
    spoil(tmp_path / "llm" / "model.safetensors", lambda _, tensor: tensor + 0.01)
    with pytest.raises(ArtifactError, match=r"llm: model.safetensors isn't what the adapter was trained over"):
        finetune.merge(run)


def read_certificate_of(run):
    finetune.merge(run)
    return read_certificate(run)


def test_rounding_alone_is_no_adapter(run):
    """Nothing learned, but other numbers: nearer to the LLM without the adapter than any bound would tell."""
    spoil(run / "adapter" / "adapter_model.safetensors", lambda name, t: torch.zeros_like(t) if "lora_B" in name else t)
    change(run / "recipe.yaml", "dtype: auto\n  min_agreement", "dtype: bfloat16\n  min_agreement")
    change(run / "recipe.yaml", "min_agreement: 0.95", "min_agreement: 0.0")
    with pytest.raises(MergeRefused, match="equals the LLM without the adapter"):
        finetune.merge(run)
    assert not (run / "merged").exists()


@pytest.mark.parametrize("at", [0, 1])
def test_an_exchange_that_is_cut_leaves_the_old_or_the_new(tmp_path, monkeypatch, at):
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "old").write_text("whole")
    replace, calls = os.replace, []

    def cut(*paths):
        calls.append(paths)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.os, "replace", cut)
        with pytest.raises(KeyboardInterrupt), run_folder.whole_folder(folder) as partial:
            (partial / "new").write_text("whole")
    with pytest.raises(ZeroDivisionError), run_folder.whole_folder(folder):
        raise ZeroDivisionError
    assert [path.name for path in folder.iterdir()] == ["old"]
    shutil.rmtree(folder)
