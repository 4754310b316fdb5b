"""LLaVA's class as it is loaded from the folder, against the composite."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BACKBONES, fresh_tokenizer, part, tiny_composite, tiny_encoder, tiny_llm
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from finetune.data.media import noise
from finetune.data.sample import Medium, Message, media_in
from finetune.export._check.probes import as_chat, prompt_batch
from finetune.export._language_model import lengthened
from finetune.export._native import NotExact, compare_files, native_class, write_files, write_native
from finetune.model.assistant import Assistant
from finetune.model.bindings import TaskBinding
from finetune.model.compose import compose
from finetune.model.composition import PLACEHOLDERS
from finetune.model.heads import HeadSettings
from finetune.model.prompts import logits as logits_of
from finetune.model.tokenize import add_placeholders

pytestmark = pytest.mark.slow

EXACT = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text", "olmo2", "stablelm"),
    *("gpt2", "gpt_neox", "opt", "bloom", "falcon", "mpt"),
)
TIED = ("llama", "gpt2", "gemma3_text")  # families whose table is also their head


def assistant_of(family="llama", encoder=None, dtype=torch.float32, vocabulary=320, tokenizer=None, **changes):
    tokenizer = tokenizer or fresh_tokenizer()
    encoder = encoder or tiny_encoder()
    placeholders = add_placeholders(tokenizer, ["image"], PLACEHOLDERS)
    encoder.module.to(dtype)
    model = compose(
        tiny_llm(family, vocabulary, **changes).to(dtype),
        encoders={"image": encoder},
        projectors={"image": part("projectors", "mlp")},
        fusion=part("fusion", "prefix"),
        placeholder_ids={"image": placeholders["image"].id},
    )
    return Assistant(model.eval(), tokenizer, placeholders, {"image": encoder})


def question(*parts):
    picture = Medium("image", "picture")
    return (Message("user", tuple(picture if one is None else one for one in parts)),)


def reason_against(model):
    """Why no class of transformers holds the composite."""
    with pytest.raises(NotExact) as refusal:
        native_class(model)
    return str(refusal.value)


def compared(assistant, folder, messages):
    """(inputs of the native class, its logits, ours), each for the same conversation about noise."""
    picture = noise("image", 3)
    media = media_in(messages)
    prepared = assistant.encoders["image"].prepare(picture)
    ours = prompt_batch(assistant, messages, dict.fromkeys(media, prepared))
    chat = as_chat(messages, dict.fromkeys(media, picture))
    inputs = AutoProcessor.from_pretrained(folder).apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert type(model) is LlavaForConditionalGeneration
    with torch.no_grad():
        return inputs, model(**inputs).logits, ours, logits_of(assistant.model, ours)


@pytest.mark.parametrize("family,tied", [*((f, False) for f in EXACT), *((f, True) for f in TIED)])
def test_logits_of_llava_are_the_composite_s(tmp_path, family, tied):
    assistant = assistant_of(family, tie_word_embeddings=tied)
    write_files(assistant, tmp_path, native_class(assistant.model))
    inputs, found, ours, expected = compared(assistant, tmp_path, question("What", None, " is this?", None))
    assert inputs["input_ids"].tolist() == ours.input_ids.tolist()
    torch.testing.assert_close(found[..., :320], expected, atol=1e-4, rtol=1e-4)
    assert found.argmax(-1).tolist() == expected.argmax(-1).tolist()


@pytest.mark.parametrize("kind", ["siglip", "clip", "vit", "dinov2", "aimv2", "dinov2_registers"])
@pytest.mark.parametrize("layer,tokens", [(-1, "patches"), (-2, "patches"), (-2, "all")])
def test_what_fits_is_exact_and_what_does_not_is_told(tmp_path, kind, layer, tokens):
    assistant = assistant_of(encoder=tiny_encoder(kind, layer=layer, tokens=tokens))
    if kind == "dinov2_registers" and tokens == "patches":
        assert "4 class and register tokens" in reason_against(assistant.model)
        return
    if kind.startswith("dinov2") and layer == -1:
        assert "before its last norm" in reason_against(assistant.model)
        return
    write_files(assistant, tmp_path, native_class(assistant.model))
    _, found, _, expected = compared(assistant, tmp_path, question(None, "What is this?"))
    torch.testing.assert_close(found[..., :320], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["phi", "granite", "cohere", "gemma2"])
def test_llms_whose_heads_do_more_are_refused(family):
    reason = reason_against(assistant_of(family).model)
    assert reason.startswith(family) and ("scales its logits" in reason or "caps its logits" in reason)


@pytest.mark.parametrize("kind", sorted({"mobilenet_v2", "convnext", "resnet"} & BACKBONES.keys()))
def test_convolutions_are_refused(kind):
    assert "rows of patches" in reason_against(assistant_of(encoder=tiny_encoder(kind)).model)


def test_every_other_part_has_its_reason():
    assert reason_against(tiny_composite()) == "no class has the encoder 'vision' with the projector 'pixel_shuffle'"
    assert "cross_attention" in reason_against(tiny_composite(projector="mlp", fusion="cross_attention"))
    assert "tiles" in reason_against(assistant_of(encoder=tiny_encoder(tiles=4)).model)
    settings = HeadSettings(labels=("a", "b"))
    head = TaskBinding(task=part("tasks", "classify"), head=part("heads", "label"), settings=settings)
    parts = {
        "encoders": {"image": tiny_encoder()},
        "projectors": {"image": part("projectors", "mlp")},
        "fusion": part("fusion", "prefix"),
        "placeholder_ids": {"image": 130},
    }
    assert "a head with weights (mood)" in reason_against(compose(tiny_llm(), **parts, bindings={"mood": head}))
    parts["projectors"] = {"image": part("projectors", "mlp", hidden=7)}
    assert "7 wide" in reason_against(compose(tiny_llm(), **parts))
    two = parts | {"placeholder_ids": {"image": 130, "video": 131}}
    two["encoders"] = {"image": tiny_encoder(), "video": tiny_encoder()}
    two["projectors"] = dict.fromkeys(("image", "video"), part("projectors", "mlp"))
    assert "2 encoders (image, video)" in reason_against(compose(tiny_llm(), **two))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_and_within_its_rounding(tmp_path, dtype):
    assistant = assistant_of(dtype=dtype)
    write_native(assistant, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}


def test_a_folder_that_gives_other_logits_is_refused(tmp_path):
    """The comparison reads what stands on disk: one weight of the projector is enough."""
    assistant = assistant_of()
    native = write_native(assistant, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (name,) = (name for name in state if name.endswith("multi_modal_projector.linear_1.weight"))
    state[name][0] += 1
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotExact, match="gives other logits, by"):
        compare_files(assistant, tmp_path, native)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps(config | {"num_additional_image_tokens": 1}))
    with pytest.raises(NotExact, match="tokens of a question"):
        compare_files(assistant, tmp_path, native)


def test_tokens_that_the_llm_did_not_know_are_never_the_likeliest():
    table = torch.randn(50, 16) + 3  # all logits far below zero: rows of nothing would be the largest
    longer = lengthened(table, 60)
    logits = (torch.randn(1000, 16) - 3) @ longer.T
    assert logits.argmax(-1).max() < 50 and torch.equal(longer[:50], table)


TEMPLATES = {
    "chatml": None,
    "no system turn": "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] | trim }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    "thinks": "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{%- if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{%- endif %}{%- endif %}",
    "begins with a line": "\n\n  {% if true %}{% endif %}{% for m in messages %}{{ m['content'] }}|{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_processor_s_tokens_are_ours_in_conversations_of_every_shape(tmp_path, name):
    tokenizer = fresh_tokenizer()
    tokenizer.chat_template = TEMPLATES[name] or tokenizer.chat_template
    assistant = assistant_of(tokenizer=tokenizer)
    write_files(assistant, tmp_path, native_class(assistant.model))
    picture = Medium("image", "picture")
    turns = [Message("user", (picture, "What is", picture, "this?")), Message("assistant", ("A red square.",))]
    turns.append(Message("user", ("And", picture)))
    shapes = [turns[:1], turns, [Message("user", ("Only text",))]]
    if name != "no system turn":
        shapes.append([Message("system", ("Be brief.",)), *turns])
    processor = AutoProcessor.from_pretrained(tmp_path)
    for messages in shapes:
        prepared = dict.fromkeys(media_in(messages), assistant.encoders["image"].prepare(noise("image")))
        chat = as_chat(messages, dict.fromkeys(prepared, noise("image")))
        for plain in (False, True):  # text alone may also stand as a string
            if plain:
                chat = [m | {"content": m["content"][0]["text"]} if len(m["content"]) == 1 else m for m in chat]
            found = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
            assert found["input_ids"] == prompt_batch(assistant, messages, prepared).input_ids.tolist()


def test_ids_and_ends_stand_in_the_config(tmp_path):
    assistant = assistant_of()
    assistant.model.language_model.generation_config.eos_token_id = [2, 5]
    write_native(assistant, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    token = assistant.placeholders["image"].id
    assert config["image_token_index"] == token == 320 and config["text_config"]["vocab_size"] == 321
    assert config["eos_token_id"] == [2, 5] and config["pad_token_id"] == 0 and config["bos_token_id"] == 1
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2, 5]
