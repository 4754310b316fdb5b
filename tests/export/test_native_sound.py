"""The classes of Qwen2-Audio and Audio Flamingo 3 as they are loaded from the folder, against the composite."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import fresh_tokenizer, part, tiny_llm
from tiny_encoders import tiny_encoder_of

from finetune.data.sample import Medium, Message
from finetune.export._check.probes import as_chat, prompt_batch
from finetune.export._native import NotExact, native_class, write_files, write_native
from finetune.model.assistant import Assistant
from finetune.model.compose import compose
from finetune.model.composition import PLACEHOLDERS
from finetune.model.encoders import whisper
from finetune.model.language_model import load_tokenizer
from finetune.model.prompts import logits as logits_of
from finetune.model.tokenize import add_placeholders

pytestmark = pytest.mark.slow

WEIGHTS = Path(__file__).parents[2] / "weights"
CLASSES = {"linear": "Qwen2AudioForConditionalGeneration", "mlp": "AudioFlamingo3ForConditionalGeneration"}
SOUND = Medium("audio", Path("sound"))
QUESTION = (Message("system", ("Be brief.",)), Message("user", (SOUND, "What is said?")))


def assistant_of(projector="linear", family="llama", encoder=None, llm=None, tokenizer=None, **changes):
    tokenizer = tokenizer or fresh_tokenizer()
    encoder = encoder or tiny_encoder_of("whisper", pool=2)
    placeholders = add_placeholders(tokenizer, ["audio"], PLACEHOLDERS)
    model = compose(
        llm or tiny_llm(family, 320, max_position_embeddings=2048, **changes),
        encoders={"audio": encoder},
        projectors={"audio": part("projectors", projector)},
        fusion=part("fusion", "prefix"),
        placeholder_ids={"audio": placeholders["audio"].id},
    )
    return Assistant(model.eval(), tokenizer, placeholders, {"audio": encoder})


def noise_of(samples, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples).astype(np.float32)


def both(assistant, folder, name, sound):
    """(ids, logits) of the native class, and ours."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = getattr(transformers, name).from_pretrained(folder).eval()
    ours = prompt_batch(assistant, QUESTION, {SOUND: assistant.encoders["audio"].prepare(sound)})
    inputs = processor.apply_chat_template(
        as_chat(QUESTION, {SOUND: sound}),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    with torch.no_grad():
        return inputs["input_ids"], model(**inputs).logits, ours.input_ids, logits_of(assistant.model, ours)


@pytest.mark.parametrize(
    "projector,family",
    [("linear", "llama"), ("linear", "qwen2"), ("linear", "gpt2"), ("mlp", "llama"), ("mlp", "phi3")],
)
def test_logits_are_the_composite_s_whatever_the_length(tmp_path, projector, family):
    assistant = assistant_of(projector, family)
    write_files(assistant, tmp_path, native_class(assistant.model))
    full = (480_000,) if family == "llama" else ()
    for samples in (8_001, 8_170, 8_330, *full):  # every way to end inside a row, and all that is heard at once
        ids, found, ours, expected = both(assistant, tmp_path, CLASSES[projector], noise_of(samples))
        assert ids.tolist() == ours.tolist(), samples
        torch.testing.assert_close(found[..., :320], expected, atol=2e-4, rtol=1e-4)


def test_a_table_that_is_the_head_too_is_written_as_both(tmp_path):
    """Neither class ties them: a head left out would be random."""
    assistant = assistant_of(tie_word_embeddings=True)
    write_native(assistant, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (head,) = (state[name] for name in state if name.endswith("lm_head.weight"))
    torch.testing.assert_close(head[:320], assistant.model.get_output_embeddings().weight)


@pytest.mark.parametrize(
    "options,projector,reason",
    [
        ({}, "linear", "isn't read as in those classes"),
        ({"pool": 2, "layer": -2}, "linear", "isn't read as in those classes"),
        ({"pool": 2, "window_seconds": 10}, "mlp", "windows of 10 seconds, those classes of 30"),
        ({"pool": 2}, "stack", "no class has the encoder 'whisper' with the projector 'stack'"),
    ],
)
def test_what_does_not_fit_is_told(options, projector, reason):
    with pytest.raises(NotExact, match=reason):
        native_class(assistant_of(projector, encoder=tiny_encoder_of("whisper", **options)).model)


def test_sound_always_padded_is_not_what_the_processor_counts(tmp_path):
    assistant = assistant_of(encoder=tiny_encoder_of("whisper", pool=2, pad_to_30_seconds=True))
    with pytest.raises(NotExact, match=r"make \d\d tokens of a question that is 7\d\d here"):
        write_native(assistant, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not (WEIGHTS / "whisper-tiny").is_dir(), reason="weights/whisper-tiny is fetched by make weights")
def test_real_weights_answer_the_same(tmp_path):
    """Whisper tiny and MiniMind2: tokens written after a recording, and its logits."""
    llm = WEIGHTS / "minimind2-small"
    encoder = whisper.build(
        whisper.Options(name=str(WEIGHTS / "whisper-tiny"), pool=2), torch.float32, torch.device("cpu")
    )
    assistant = assistant_of(
        encoder=encoder,
        llm=transformers.AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval(),
        tokenizer=load_tokenizer(str(llm)),
    )
    write_files(assistant, tmp_path, native_class(assistant.model))
    ids, found, ours, expected = both(assistant, tmp_path, CLASSES["linear"], noise_of(20_010))
    assert ids.tolist() == ours.tolist()
    assert (found[..., : expected.shape[-1]] - expected).norm() < 1e-4 * expected.norm()
    assert found.argmax(-1).tolist() == expected.argmax(-1).tolist()
