"""Exported models asked in the real vLLM, over OpenAI's API: the same tokens as ours. `install_vllm.sh` makes the
environment; the variable FINETUNE_VLLM names its python.
"""

import os
from pathlib import Path

import PIL.Image
import pytest
import soundfile
import torch
import transformers
from tiny import COLOURS, part, tiny_picture
from tiny_encoders import tiny_encoder_of, tiny_sound
from tiny_merged import merged_with_adapter, tiny_merged

from finetune.data.sample import Medium, Message
from finetune.export import vllm
from finetune.export._check.probes import answered
from finetune.export._contract import MergedModel
from finetune.model.load import load_merged

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif("FINETUNE_VLLM" not in os.environ, reason="FINETUNE_VLLM names no python that has vLLM"),
]
WEIGHTS = Path(__file__).parents[2] / "weights"
CPU = torch.device("cpu")
NEW_TOKENS = 8


def real(kind: str, name: str, **options):
    return part("encoders", kind, name=str(WEIGHTS / name), **options).build(torch.float32, CPU)


def real_llm() -> dict:
    folder = WEIGHTS / "minimind2-small"
    llm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return {"llm": llm, "tokenizer": transformers.AutoTokenizer.from_pretrained(folder)}


def needs(*names: str):
    missing = [name for name in names if not (WEIGHTS / name).is_dir()]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}; recipes/offline/fetch.py fetches them")


def pictures(folder: Path) -> list[Medium]:
    """Of odd shapes, so that scaling and cropping weigh in."""
    red = tiny_picture(COLOURS["red"], (90, 61))
    ramp = PIL.Image.linear_gradient("L").resize((64, 130)).convert("RGB")
    paths = [folder / "red.png", folder / "ramp.png"]
    for picture, path in zip((red, ramp), paths, strict=True):
        picture.save(path)
    return [Medium("image", path) for path in paths]


def recordings(folder: Path) -> list[Medium]:
    """Of two lengths."""
    paths = [folder / "short.wav", folder / "long.wav"]
    for number, path in enumerate(paths):
        soundfile.write(path, tiny_sound(0.8 + number, seed=number), 16_000)
    return [Medium("audio", path) for path in paths]


def questions(media: list[tuple[Medium, ...]], text: str) -> list[tuple[Message, ...]]:
    """The same text about each, and the first once more behind a system turn and an answer."""
    conversations = [(Message("user", (*shown, text)),) for shown in media]
    before = (Message("system", ("Be brief.",)), *conversations[0], Message("assistant", ("A square.",)))
    return [*conversations, (*before, Message("user", ("Once more.",)))]


def answers_about(
    media: list[tuple[Medium, ...]], folder: Path, adapter: Path | None = None, text: str = "What is this?"
) -> tuple[str, list[tuple[int, ...]], list[tuple[int, ...]]]:
    """(the class that FOLDER/merged is written as, our answers, vLLM's answers) as token ids."""
    probes = answered(load_merged(folder / "merged", CPU), questions(media, text), folder, NEW_TOKENS)
    assert len(probes) == len(media) + 1
    (folder / "out").mkdir()
    options = vllm.Options(adapter=adapter is not None)
    exported = vllm.write(MergedModel(folder / "merged", adapter), folder / "out", options)
    answers = vllm.answer(folder / "out", probes, options, NEW_TOKENS).answers
    return exported.model_class, [probe.answer for probe in probes], list(answers)


def test_llava_with_a_siglip_tower(tmp_path):
    encoders = {"image": tiny_encoder_of("siglip")}
    tiny_merged(tmp_path / "merged", encoders, {"image": part("projectors", "mlp")}, louder=5)
    shown = pictures(tmp_path)
    model_class, ours, theirs = answers_about([*((one,) for one in shown), tuple(shown), ()], tmp_path)
    assert model_class == "LlavaForConditionalGeneration"
    assert theirs == ours
    assert len(set(theirs[:4])) == 4


@needs("minimind2-small", "mobilenet-v2")
def test_the_own_class_with_a_real_mobilenet_and_a_real_llm(tmp_path):
    encoders = {"image": real("vision", "mobilenet-v2")}
    tiny_merged(tmp_path / "merged", encoders, {"image": part("projectors", "mlp")}, louder=2, **real_llm())
    media = [*((one,) for one in pictures(tmp_path)), ()]
    model_class, ours, theirs = answers_about(media, tmp_path, text="这是什么？")
    assert model_class == "ServedModel"
    assert theirs == ours
    assert len(set(theirs[:3])) == 3


@needs("minimind2-small", "whisper-tiny")
def test_sound_with_a_real_whisper_and_a_real_llm(tmp_path):
    encoders = {"audio": real("whisper", "whisper-tiny")}
    projectors = {"audio": part("projectors", "stack", factor=8)}
    tiny_merged(tmp_path / "merged", encoders, projectors, louder=0.5, **real_llm())
    media = [*((one,) for one in recordings(tmp_path)), ()]
    _, ours, theirs = answers_about(media, tmp_path, text="这是什么？")
    assert theirs == ours
    assert len(set(theirs[:3])) == 3


def test_pictures_and_sound_in_one_model(tmp_path):
    tiny_merged(
        tmp_path / "merged",
        {"image": tiny_encoder_of("siglip"), "audio": tiny_encoder_of("whisper")},
        {
            "image": part("projectors", "resampler", queries=3, width=16, heads=2),
            "audio": part("projectors", "stack", factor=4),
        },
        louder=5,
    )
    (red, ramp), (short, long) = pictures(tmp_path), recordings(tmp_path)
    model_class, ours, theirs = answers_about([(red,), (short,), (ramp, long), (long, red, short)], tmp_path)
    assert model_class == "ServedModel"
    assert theirs == ours
    assert len(set(theirs[:4])) == 4


def test_an_adapter_over_a_base_with_the_projectors_in_it(tmp_path):
    encoders, projectors = {"image": tiny_encoder_of("siglip")}, {"image": part("projectors", "mlp")}
    merged_with_adapter(tmp_path, encoders, projectors)
    media = [*((one,) for one in pictures(tmp_path)), ()]
    _, ours, theirs = answers_about(media, tmp_path, adapter=tmp_path / "adapter")
    assert theirs == ours
    assert len(set(theirs[:3])) == 3
