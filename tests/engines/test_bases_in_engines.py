"""Merged bases in the real engines, which begin every answer to the held-out questions as the merged model does."""

import os

import pytest
from families import ZOO, family_folder
from families.recipes import base_recipe

import finetune

pytestmark = pytest.mark.engines
VARIABLES = {"vllm": "FINETUNE_VLLM", "gguf": "FINETUNE_LLAMA_CPP"}
OPTIONS = {"vllm": (), "gguf": ("quantization=F32",)}


@pytest.mark.parametrize(
    "target, name, medium",
    [
        ("vllm", "llava", "image"),  # its prompts begin with a token that its template leaves out
        ("vllm", "internvl", "image"),
        ("vllm", "smolvlm", "image"),  # its embeddings are tied outside the LLM's config
        ("vllm", "ultravox", "audio"),  # vLLM's own class takes no Llama
        ("gguf", "qwen2_vl", "image"),
        ("gguf", "qwen3_vl", "image"),
        ("gguf", "smolvlm", "image"),  # its template writes another colon before a picture
    ],
)
def test_an_engine_answers_as_the_merged_base(tmp_path, target, name, medium):
    if not os.environ.get(VARIABLES[target]):
        pytest.skip(f"{VARIABLES[target]} names no engine")
    if missing := ZOO[name].missing:
        pytest.skip(f"its processor needs {', '.join(missing)}")
    recipe = base_recipe(tmp_path, ZOO[name], family_folder(name, tmp_path / "base"), medium)
    run = finetune.train(recipe, tmp_path / "run")
    finetune.evaluate(run)
    finetune.merge(run)
    found = finetune.export_run(run, target, options=["min_equal=1", *OPTIONS[target]]).verification
    assert found.equal_first_tokens == found.rows == 4 and found.different > 1
