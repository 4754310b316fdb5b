"""The kit's own class through transformers' Auto classes, against the assistant on the same folder."""

import base64
import io

import numpy as np
import pytest
import soundfile
import torch
from tiny import part, tiny_encoder
from tiny_encoders import tiny_clip, tiny_encoder_of, tiny_sound
from tiny_merged import tiny_merged, wide_llm
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)

import finetune.model.auto
from finetune.common.errors import DataError
from finetune.data.media import noise
from finetune.data.sample import Medium, Message
from finetune.export._check.probes import prompt_batch
from finetune.model.load import load_merged
from finetune.model.processor import MultimodalProcessor
from finetune.model.prompts import logits as logits_of

pytestmark = pytest.mark.slow

PICTURE, OTHER = noise("image"), noise("image", 1)
QUESTION = [
    {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What is this?"}]}
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three encoders with tiles, windows and time marks, around an LLM whose logits are scaled."""
    encoders = {
        "image": tiny_encoder(tiles=4),
        "audio": tiny_encoder_of("whisper"),
        "video": tiny_encoder_of("siglip_frames"),
    }
    projectors = {
        "image": part("projectors", "pixel_shuffle"),
        "audio": part("projectors", "stack"),
        "video": part("projectors", "linear"),
    }
    llm = wide_llm("granite", max_position_embeddings=2048)
    return tiny_merged(tmp_path_factory.mktemp("merged"), encoders, projectors, llm=llm, louder=4.0)


@pytest.fixture(scope="module")
def loaded(folder):
    return AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()


def inputs_of(processor, messages, **options):
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, **options
    )


def test_every_auto_class_loads_it(folder):
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model, report = auto_class.from_pretrained(folder, output_loading_info=True)
        assert type(model) is finetune.model.auto.MultimodalForConditionalGeneration
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(AutoProcessor.from_pretrained(folder), MultimodalProcessor)


def test_generate_gives_the_prompt_and_the_assistant_s_answer(folder, loaded, tmp_path):
    processor, model = loaded
    inputs = inputs_of(processor, QUESTION)
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(tokens[:, :length], inputs["input_ids"])
    PICTURE.save(tmp_path / "picture.png")
    ours = load_merged(folder).answer("What is this?", image=tmp_path / "picture.png", max_new_tokens=12)
    assert processor.decode(tokens[0, length:], skip_special_tokens=True).strip() == ours
    output = model.generate(
        **inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert torch.equal(output.sequences, tokens) and len(output.logits) == tokens.shape[1] - length
    several = model.generate(**inputs, max_new_tokens=3, num_beams=3, num_return_sequences=2)
    assert several.shape[0] == 2 and torch.equal(several[:, :length], inputs["input_ids"].repeat(2, 1))


def test_ids_and_logits_are_the_assistant_s_for_every_kind_of_medium(folder, loaded):
    processor, model = loaded
    assistant = load_merged(folder)
    decoded = {"image": PICTURE, "audio": tiny_sound(), "video": tiny_clip()}
    media = {kind: Medium(kind, kind) for kind in decoded}
    messages = (Message("system", ("Be brief.",)), Message("user", ("See", *media.values(), "What is this?")))
    prepared = {media[kind]: assistant.encoders[kind].prepare(one) for kind, one in decoded.items()}
    ours = prompt_batch(assistant, messages, prepared)
    chat = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "See"},
                *({"type": kind, kind: one} for kind, one in decoded.items()),
                {"type": "text", "text": "What is this?"},
            ],
        },
    ]
    inputs = inputs_of(processor, chat)
    assert torch.equal(inputs["input_ids"], ours.input_ids)
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    again = processor(text=text, images=[PICTURE], audio=[tiny_sound()], videos=[tiny_clip()], return_tensors="pt")
    assert torch.equal(again["input_ids"], ours.input_ids)
    with torch.no_grad():
        expected = logits_of(assistant.model, ours)
        for found in (inputs, again):
            torch.testing.assert_close(model(**found).logits, expected)


def test_a_batch_answers_as_its_rows_alone(loaded):
    processor, model = loaded
    other = [{"role": "user", "content": [{"type": "image", "image": OTHER}, {"type": "text", "text": "?"}]}]
    text = [{"role": "user", "content": "Describe a red square, then a blue one."}]
    batch = inputs_of(processor, [QUESTION, text, other])
    assert batch["attention_mask"].sum(-1).tolist() == [
        inputs_of(processor, c)["input_ids"].shape[1] for c in (QUESTION, text, other)
    ]
    together = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for row, chat in zip(together, (QUESTION, text, other), strict=True):
        alone = inputs_of(processor, chat)
        tokens = model.generate(**alone, max_new_tokens=6, do_sample=False)[0, alone["input_ids"].shape[1] :]
        assert row[: len(tokens)].tolist() == tokens.tolist()


def test_saving_and_loading_again_changes_nothing(folder, loaded, tmp_path):
    processor, model = loaded
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again, other = AutoProcessor.from_pretrained(tmp_path), AutoModelForMultimodalLM.from_pretrained(tmp_path)
    inputs = inputs_of(again, QUESTION)
    assert torch.equal(inputs["input_ids"], inputs_of(processor, QUESTION)["input_ids"])
    assert again.chat_template == processor.chat_template
    assert other.generation_config.eos_token_id == model.generation_config.eos_token_id
    with torch.no_grad():
        torch.testing.assert_close(other(**inputs).logits, model(**inputs).logits, atol=0, rtol=0)


def test_media_come_as_files_bytes_data_uris_or_decoded(loaded, tmp_path):
    processor, _ = loaded
    content = io.BytesIO()
    PICTURE.save(content, "PNG")
    (tmp_path / "p.png").write_bytes(content.getvalue())
    uri = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    expected = inputs_of(processor, QUESTION)["media"]["image"][0]
    path = str(tmp_path / "p.png")
    parts = [{"type": "image", "image": path}, {"type": "image", "path": path}, {"type": "image", "url": uri}]
    parts += [{"type": "image_url", "image_url": {"url": uri}}, {"type": "image", "image": content.getvalue()}]
    parts += [{"type": "image", "base64": base64.b64encode(content.getvalue()).decode()}]
    for one in parts:
        assert torch.equal(inputs_of(processor, [{"role": "user", "content": [one]}])["media"]["image"][0], expected)
    soundfile.write(tmp_path / "s.wav", tiny_sound(), 16_000, subtype="FLOAT")
    sound = {"data": base64.b64encode((tmp_path / "s.wav").read_bytes()).decode(), "format": "wav"}
    sounds = [
        inputs_of(processor, [{"role": "user", "content": [one]}])["media"]["audio"][0]
        for one in ({"type": "input_audio", "input_audio": sound}, {"type": "audio", "audio": tiny_sound()})
    ]
    torch.testing.assert_close(*sounds)


def test_what_does_not_fit_is_said(loaded, tmp_path):
    processor, _ = loaded
    with pytest.raises(DataError, match=r"fewer image than there are <\|image\|> in the text"):
        processor(text="<|image|><|image|>", images=[PICTURE])
    with pytest.raises(DataError, match=r"more audio than there are <\|audio\|>"):
        processor(text="no place", audio=[tiny_sound()])
    with pytest.raises(DataError, match=r"no such file: .*gone.png"):
        processor(text="<|image|>", images=[tmp_path / "gone.png"])
    with pytest.raises(DataError, match="nothing is downloaded here"):
        processor(text="<|image|>", images=["https://example.com/a.png"])
    with pytest.raises(DataError, match="audio: samples of shape"):
        processor(text="<|audio|>", audio=[np.zeros((2, 100), np.float32)])
    with pytest.raises(DataError, match="sampling_rate is 8000"):
        processor(text="<|audio|>", audio=[tiny_sound()], sampling_rate=8000)
    with pytest.raises(DataError, match="has no medium"):
        inputs_of(processor, [{"role": "user", "content": [{"type": "image"}]}])


def test_transformers_pipeline_takes_it(loaded):
    processor, model = loaded
    answer = pipeline("image-text-to-text", model=model, processor=processor)
    text = answer(text=QUESTION, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    inputs = inputs_of(processor, QUESTION)
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert text == processor.decode(tokens, skip_special_tokens=True)
