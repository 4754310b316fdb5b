"""Prompts that begin with the same medium are read behind it, and answered as if each were read whole."""

import pytest
import torch
from packed import KINDS, bindings_for_tests
from tiny import FAMILIES, FUSIONS, fresh_tokenizer, part, tiny_encoder, tiny_llm, tiny_picture

from finetune.data.sample import Message
from finetune.model import assistant as module
from finetune.model import prompts
from finetune.model.assistant import Assistant, groups_by_first_medium, media_of
from finetune.model.compose import compose
from finetune.model.tokenize import add_placeholders

RED, BLUE = tiny_picture((220, 30, 30)), tiny_picture((30, 30, 220), (30, 40))
ASKED = [
    (RED, "What is this?"),
    (BLUE, "What is this? Describe the picture."),
    (RED, "Describe"),
    (None, "What is a red square?"),
    (BLUE, "a"),
    (RED, "What"),
]


ALL_KINDS = {**KINDS, "words": ("language", ["a", "b c", "d"])}


def assistant_of(family, fusion="prefix", **changes):
    torch.manual_seed(0)
    tokenizer = fresh_tokenizer()
    placeholders = add_placeholders(tokenizer, ["image"], {"image": "<picture>"})
    encoder = tiny_encoder()
    model = compose(
        tiny_llm(family, 416, eos_token_id=tokenizer.eos_token_id, **changes),
        encoders={"image": encoder},
        projectors={"image": part("projectors", "mlp")},
        fusion=part("fusion", fusion, **FUSIONS[fusion]),
        placeholder_ids={"image": placeholders["image"].id},
        bindings=bindings_for_tests(ALL_KINDS),
    )
    return Assistant(model.eval(), tokenizer, placeholders, {"image": encoder})


def conversations():
    media = {id(picture): media_of(image=picture) for picture in (RED, BLUE, None)}
    return [[Message("user", (*media[id(picture)], question))] for picture, question in ASKED]


def answered(assistant, monkeypatch, share):
    """The answers, and how many tokens were read before them."""
    monkeypatch.setattr(module, "LEAST_SHARED", 0.0 if share else 2.0)
    widths, embed = [], assistant.model.embed
    monkeypatch.setattr(assistant.model, "embed", lambda ids, *rest: widths.append(ids.numel()) or embed(ids, *rest))
    answers = assistant.answers(conversations(), max_new_tokens=8)
    monkeypatch.undo()
    return answers, sum(widths)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_prompts_read_whole(family, monkeypatch):
    assistant = assistant_of(family)
    whole, tokens = answered(assistant, monkeypatch, share=False)
    shared, fewer = answered(assistant, monkeypatch, share=True)
    assert shared == whole and (len(set(whole)) > 1 or family == "bloom")  # whose answers end at once
    assert fewer < tokens if family not in {"bloom", "mpt"} else fewer == tokens  # their positions can't be given


@pytest.mark.parametrize("window, shares", [(6, False), (256, True)])
def test_prompts_that_reach_beyond_a_sliding_window_are_read_whole(window, shares, monkeypatch):
    assistant = assistant_of("mistral", sliding_window=window)
    whole, tokens = answered(assistant, monkeypatch, share=False)
    found, fewer = answered(assistant, monkeypatch, share=True)
    assert found == whole and (fewer < tokens) is shares


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt"])
@pytest.mark.parametrize("name", ALL_KINDS)
def test_heads_and_labels_read_behind_a_medium_what_they_read_whole(family, name, monkeypatch):
    assistant = assistant_of(family)
    monkeypatch.setattr(module, "LEAST_SHARED", 2.0)
    whole = assistant.ask(name, conversations())
    monkeypatch.setattr(module, "LEAST_SHARED", 0.0)
    read, prefixes = prompts._read, []
    monkeypatch.setattr(prompts, "_read", lambda model, prefix: prefixes.append(prefix) or read(model, prefix))
    shared = assistant.ask(name, conversations())
    assert prefixes and len(shared) == len(whole) == len(ASKED)
    for one, other in zip(whole, shared, strict=True):
        assert other.number == pytest.approx(one.number, rel=1e-4) if one.number is not None else other.text == one.text
        assert other.probabilities == (one.probabilities and pytest.approx(one.probabilities, abs=1e-5))
    values = [one.number or tuple((one.probabilities or {}).values()) for one in whole]
    assert len(set(values)) == len(ASKED)


def test_cross_attention_reads_prompts_whole(monkeypatch):
    assistant = assistant_of("llama", "cross_attention")
    (whole, tokens), (again, as_many) = (answered(assistant, monkeypatch, share) for share in (False, True))
    assert (again, as_many) == (whole, tokens)


def test_prompts_are_grouped_by_their_medium_and_not_by_its_name():
    """Each picture is called 'image 1'."""
    assistant = assistant_of("llama")
    asked = assistant._prompts(conversations(), {}, module.FileView(assistant.encoders, assistant.limits))
    groups = groups_by_first_medium(asked)
    assert [group.members for group in groups] == [[0, 2, 5], [1, 4], [3]]
    assert all(group.tokens >= 16 for group in groups[:2])
    first, rest = asked[1].before(groups[1].tokens), asked[1].after(groups[1].tokens)
    assert first.input_ids + rest.input_ids == asked[1].input_ids
    assert len(first.media) == 1 and not rest.media
