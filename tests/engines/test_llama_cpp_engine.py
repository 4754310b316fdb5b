"""Exports to GGUF, asked in the real llama.cpp: `FINETUNE_LLAMA_CPP` names its folder (tests/engines/
install_llama_cpp.sh builds one).
"""

import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
import transformers
from tiny import part
from tiny_encoders import tiny_encoder_of, tiny_sound
from tiny_merged import tiny_merged, wide_llm

from finetune.common.errors import ExportRefused
from finetune.data.sample import Medium, Message
from finetune.export import gguf
from finetune.export._check.probes import answered
from finetune.export._contract import MergedModel
from finetune.export._run import export_run
from finetune.model.language_model import load_tokenizer
from finetune.model.load import load_merged

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(not os.environ.get("FINETUNE_LLAMA_CPP"), reason="FINETUNE_LLAMA_CPP names no llama.cpp"),
]
MINIMIND = Path(__file__).parents[2] / "weights" / "minimind2-small"
TOKENS = 8


def encoders_of(*kinds: str):
    """Random encoders, whose projected rows are loud enough for the LLM to mind them."""
    encoders = {
        "image": tiny_encoder_of("siglip"),
        "audio": tiny_encoder_of("whisper", pad_to_30_seconds=True),
    }
    projectors = {"image": part("projectors", "mlp"), "audio": part("projectors", "stack", factor=4)}
    return {kind: encoders[kind] for kind in kinds}, {kind: projectors[kind] for kind in kinds}


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    """A real LLM between random encoders."""
    if not MINIMIND.is_dir():
        pytest.skip("needs weights/minimind2-small: make weights NAMES=minimind2_small")
    torch.manual_seed(0)
    llm = transformers.AutoModelForCausalLM.from_pretrained(MINIMIND, dtype=torch.float32)
    encoders, projectors = encoders_of("image", "audio")
    folder = tmp_path_factory.mktemp("merged") / "merged"
    return tiny_merged(folder, encoders, projectors, llm=llm, tokenizer=load_tokenizer(str(MINIMIND)), louder=20)


def questions_of(folder: Path) -> list[tuple[Message, ...]]:
    """Pictures of every shape, sounds of every length, text alone, and several turns."""
    media = []
    halves = (((0, 0, 0), (0, 0, 0)), ((255,) * 3, (255,) * 3), ((255, 0, 0), (0, 0, 0)), ((0, 0, 255), (255,) * 3))
    for number, (size, colours) in enumerate(zip(((32, 32), (90, 60), (31, 77), (640, 200)), halves, strict=True)):
        two = PIL.Image.fromarray(np.array([colours], np.uint8))
        two.resize(size, PIL.Image.Resampling.NEAREST).save(folder / f"{number}.png")
        media.append(Medium("image", folder / f"{number}.png"))
    for number, seconds in enumerate((0.4, 2.1, 7.0)):
        soundfile.write(folder / f"{number}.wav", 3 * tiny_sound(seconds, seed=number), 16_000, subtype="FLOAT")
        media.append(Medium("audio", folder / f"{number}.wav"))
    questions = [(Message("user", (medium, "what is this?")),) for medium in media]
    turns = (*questions[0], Message("assistant", ("A square.",)), Message("user", ("And ", media[4], " this?")))
    return [*questions, (Message("system", ("be brief",)), Message("user", ("before ", media[1], " behind"))), turns]


@pytest.fixture(scope="module")
def probes(merged, tmp_path_factory):
    """What the merged model answers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("media")
    conversations = [*questions_of(folder), (Message("user", ("what is this?",)),)]
    return answered(load_merged(merged, torch.device("cpu")), conversations, folder, TOKENS)


@pytest.mark.parametrize("quantization, least", [("F32", 1.0), ("Q6_K", 0.5)])
def test_llama_cpp_answers_as_the_merged_model(tmp_path, merged, probes, quantization, least):
    options = gguf.Options(quantization=quantization)
    exported = gguf.write(MergedModel(merged), tmp_path, options)
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "mmproj.gguf", "Modelfile"}
    assert exported.details["projector_types"] == {"image": "mlp", "audio": "ultravox"}
    answers = gguf.answer(tmp_path, probes, options, TOKENS).answers
    alike = [answer[:4] == probe.answer[:4] for answer, probe in zip(answers, probes, strict=True)]
    assert len(probes) == 10 and sum(alike) >= least * len(alike), (answers, probes)
    # Two pictures, a sound and text alone: what it answers is about what it is given.
    assert len({answers[which] for which in (0, 1, 4, -1)}) == 4


def test_the_stage_compares(tmp_path, merged):
    result = export_run(merged, "gguf", tmp_path / "out")
    assert result.verification.equal_first_tokens >= 0.9 * result.verification.rows > 3
    assert "llama.cpp" in result.verification.engine and result.model_class == "llama Q8_0"


def test_an_llm_that_llama_cpp_does_not_know_is_refused(tmp_path):
    encoders, projectors = encoders_of("image")
    other = tiny_merged(tmp_path / "merged", encoders, projectors, llm=wide_llm("opt", word_embed_proj_dim=64))
    with pytest.raises(ExportRefused, match=r"can't write this LLM: .*OPTForCausalLM is not supported"):
        export_run(other, "gguf")
    assert not (tmp_path / "merged-gguf").exists()
