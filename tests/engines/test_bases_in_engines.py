"""Merged bases in the real vLLM, which begins every answer to the held-out questions as the merged model does."""

import os

import pytest
from families import ZOO, family_folder
from families.recipes import base_recipe

import finetune

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif("FINETUNE_VLLM" not in os.environ, reason="FINETUNE_VLLM names no python that has vLLM"),
]


@pytest.mark.parametrize(
    "name, medium",
    [
        ("llava", "image"),  # its prompts begin with a token that its template leaves out
        ("internvl", "image"),
    ],
)
def test_an_engine_answers_as_the_merged_base(tmp_path, name, medium):
    recipe = base_recipe(tmp_path, ZOO[name], family_folder(name, tmp_path / "base"), medium)
    run = finetune.train(recipe, tmp_path / "run")
    finetune.evaluate(run)
    finetune.merge(run)
    found = finetune.export_run(run, "vllm", options=["min_equal=1"]).verification
    assert found.equal_first_tokens == found.rows == 4 and found.different > 1
