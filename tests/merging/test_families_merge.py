"""Every family from its recipe to a merged folder that transformers loads by itself."""

from contextlib import contextmanager

import pytest
import torch
from families import ZOO, conversation, family_folder
from families.native import native_inputs, native_model, native_processor
from families.recipes import base_recipe

import finetune

QUICK = {"llava", "qwen2_5_vl", "gemma3", "audioflamingo3"}
CASES = [
    pytest.param(name, medium, marks=() if name in QUICK else pytest.mark.slow, id=f"{name}-{medium}")
    for name, family in ZOO.items()
    for medium in family.media
    if medium != "video"
]


@contextmanager
def without_weights(folder):
    """With configs, processor and tokenizer alone."""
    files = [*folder.glob("*.safetensors")]
    assert files
    for file in files:
        file.rename(file.with_suffix(".hidden"))
    yield
    for file in files:
        file.with_suffix(".hidden").rename(file)


@pytest.mark.parametrize("name, medium", CASES)
def test_a_family_is_tuned_merged_and_loaded_again(tmp_path, name, medium):
    if missing := ZOO[name].missing:
        pytest.skip(f"its processor needs {', '.join(missing)}")
    base = family_folder(name, tmp_path / "base")
    recipe = base_recipe(tmp_path, ZOO[name], base, medium)
    with without_weights(base):
        assert finetune.check(recipe).splits["train"].rows == 8
    run = finetune.train(recipe, tmp_path / "run")
    losses = run.read_metrics()["train"]["stages"]["tune"]["losses"]
    assert losses[-1] < losses[0]
    finetune.evaluate(run)
    certificate = finetune.merge(run)
    assert certificate.saved.agreement == 1 and certificate.saved.kl < 1e-4
    # transformers alone reads the merged folder, and answers otherwise than before.
    merged = run.path / "merged"
    inputs = native_inputs(native_processor(merged), conversation(name, medium))
    with torch.no_grad():
        after, before = (native_model(folder)(**inputs).logits for folder in (merged, base))
    assert (after - before).abs().max() > 1e-2
    content = conversation(name, medium)[0]["content"][0][medium]
    shown = {medium: content if medium == "image" else (content, 16_000)}
    texts = [finetune.load(folder).answer("What is this?", **shown, max_new_tokens=4) for folder in (run.path, merged)]
    assert texts[0] == texts[1]
