"""Merged bases in the real engines: each begins every answer to the held-out questions as the merged model does."""

import os

import pytest
from families import ZOO, family_folder
from families.recipes import base_recipe

import finetune

pytestmark = pytest.mark.engines
VLLM = pytest.mark.skipif("FINETUNE_VLLM" not in os.environ, reason="FINETUNE_VLLM names no python that has vLLM")
LLAMA_CPP = pytest.mark.skipif("FINETUNE_LLAMA_CPP" not in os.environ, reason="FINETUNE_LLAMA_CPP names no llama.cpp")
EXACT = {"vllm": [], "gguf": ["quantization=F32"]}


@pytest.mark.parametrize(
    "name, medium, target",
    [
        pytest.param("llava", "image", "vllm", marks=VLLM),  # its template leaves out the first token
        pytest.param("internvl", "image", "vllm", marks=VLLM),
        pytest.param("qwen3_vl", "image", "gguf", marks=LLAMA_CPP),
        pytest.param("qwen2_vl", "image", "gguf", marks=LLAMA_CPP),
    ],
)
def test_an_engine_answers_as_the_merged_base(tmp_path, name, medium, target):
    recipe = base_recipe(tmp_path, ZOO[name], family_folder(name, tmp_path / "base"), medium)
    run = finetune.train(recipe, tmp_path / "run")
    finetune.evaluate(run)
    finetune.merge(run)
    found = finetune.export_run(run, target, options=["min_equal=1", *EXACT[target]]).verification
    assert found.equal_first_tokens == found.rows == 4 and found.different > 1
