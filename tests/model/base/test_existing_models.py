"""Existing models as bases, family by family: token ids, logits and answers are those of transformers' own processors
and forwards.
"""

import math
from dataclasses import replace
from pathlib import Path

import PIL.Image
import PIL.ImageFile
import pytest
import torch
from families import ZOO, conversation, family_folder, noise
from families.native import native_inputs, native_model, native_processor
from families.recipes import base_settings
from peft import PeftModel

from finetune.common.errors import ModelError
from finetune.data.sample import Medium, Message, Sample
from finetune.model.adapter import save_trained
from finetune.model.assistant import Assistant, FileView
from finetune.model.base.both_ways import answer_types
from finetune.model.base.config import media_in_config
from finetune.model.base.existing import beside_language, language_modules
from finetune.model.base.roles import encoder_of, linear_layers
from finetune.model.build import build_model, load_components
from finetune.model.features import Features
from finetune.model.padding import left_padded_positions
from finetune.model.prompts import PromptBatch, answer_log_probabilities, generate
from finetune.model.row_layout import RowKind
from finetune.model.tokenize import tokenize, tokenize_prompt
from finetune.recipe.schema import Adapter, Base, Limits, Model
from finetune.training.base_trial import base_row_kind

CPU = torch.device("cpu")
NOT_YET = {"voxtral"}  # its processor has no `__call__` for text with media
ONE_SIZE = {"llava", "gemma3", "paligemma"}  # whatever the picture's
PREFIX = {"paligemma"}  # whose prompts are read both ways
# Ours ends what the template leaves open, or asks as the template answers.
ENDED_BY_US = {"llava"}
ASKED_AS_ANSWERED = {"llava_onevision"}


class Opened:
    """A family's folder as a base, and as transformers has it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, family_folder(name, folder)
        model = Model(base=Base(name=str(folder), quantize="none"))
        self.components = load_components(model, {}, 0, CPU)
        self.model = build_model(self.components, None, seed=0, bindings={}, with_encoders=False)
        self.view = FileView(self.components.encoders, Limits())
        self.native, self.processor = native_model(self.folder), native_processor(self.folder)

    @property
    def media(self) -> list[str]:
        return [medium for medium in self.components.base.media if medium != "video"]

    def sample(self, medium: str, seed: int = 0) -> Sample:
        shown = conversation(self.name, medium, seed=seed)[0]["content"][0][medium]
        content = (shown, 16_000) if medium == "audio" else shown
        question = (Medium(medium, Path(f"shown {seed}"), content=content), "What is this?")
        return Sample((Message("user", question), Message("assistant", ("a red square",))), "row")

    def tokens(self, sample: Sample):
        parts = self.components
        segments = parts.placement.segments_by(self.view.layout)
        return tokenize(sample, parts.tokenizer, parts.placeholders, segments)

    def batch(self, tokens) -> PromptBatch:
        mask = torch.ones(1, len(tokens.input_ids), dtype=torch.long)
        features: dict = {}
        for medium in tokens.media:
            features.setdefault(medium.kind, []).append(self.view.features(medium))
        positions = left_padded_positions([tokens.positions], mask)
        return PromptBatch(torch.tensor([tokens.input_ids]), mask, features, rope_positions=positions)


@pytest.fixture(scope="module", params=[name for name in ZOO if name not in NOT_YET])
def opened(request, tmp_path_factory) -> Opened:
    if missing := ZOO[request.param].missing:
        pytest.skip(f"its processor needs {', '.join(missing)}")
    return Opened(request.param, tmp_path_factory.mktemp(request.param))


def test_media_are_told_by_the_config_alone(opened):
    config = opened.components.base.config.to_dict()
    assert set(media_in_config(config)) == set(ZOO[opened.name].media)


def test_token_ids_are_those_of_the_native_processor(opened):
    for medium in opened.media:
        native = native_inputs(opened.processor, conversation(opened.name, medium))["input_ids"][0].tolist()
        ours = opened.tokens(opened.sample(medium)).input_ids
        if opened.name in ENDED_BY_US:
            assert ours.pop() == opened.components.tokenizer.eos_token_id
        if opened.name in ASKED_AS_ANSWERED:  # up to the answer
            native = native_inputs(opened.processor, conversation(opened.name, medium)[:1], add_generation_prompt=True)[
                "input_ids"
            ][0].tolist()
            ours = ours[: len(native)]
        assert ours == native


def test_placeholders_of_pictures_are_counted_before_a_pixel_is_decoded(opened, tmp_path, monkeypatch):
    """As many as transformers' processor writes for the picture itself."""
    if "image" not in opened.media:
        return
    counts = set()
    for number, size in enumerate([(80, 48), (37, 61), (33, 32), (24, 160), (200, 90)]):
        path = tmp_path / f"{number}.png"
        noise(size, number).save(path)
        with monkeypatch.context() as patched:
            patched.setattr(PIL.ImageFile.ImageFile, "load", lambda self: pytest.fail("a pixel was decoded"))
            layout = Features(opened.components.encoders, None, Limits()).layout(Medium("image", path))
        (asked, *_) = conversation(opened.name, "image")
        asked["content"][0]["image"] = PIL.Image.open(path).convert("RGB")
        ids = native_inputs(opened.processor, [asked], add_generation_prompt=True)["input_ids"]
        count = int((ids == opened.components.base.token_id("image")).sum())
        assert layout.rows * len(layout.marks) == count > 0, size
        counts.add(count)
    assert (len(counts) == 1) == (opened.name in ONE_SIZE)


def test_logits_are_those_of_the_native_forward(opened):
    for medium in opened.media:
        inputs = native_inputs(opened.processor, conversation(opened.name, medium))
        tokens = opened.tokens(opened.sample(medium)).before(inputs["input_ids"].shape[1])
        if opened.name in ASKED_AS_ANSWERED:
            continue  # compared by the trial, on ids of ours
        batch = opened.batch(tokens)
        types = {"token_type_ids": inputs["token_type_ids"]} if opened.name in PREFIX else {}
        with torch.no_grad():
            theirs = opened.native(**inputs).logits
            ours = opened.model(
                batch.input_ids,
                batch.features,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids if tokens.positions else None,
                **types,
            ).logits
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_answers_are_those_of_the_native_class(opened):
    for medium in opened.media:
        question = conversation(opened.name, medium)[:1]
        inputs = native_inputs(opened.processor, question, add_generation_prompt=True)
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": []}
        theirs = opened.native.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
        parts = opened.components
        sample = opened.sample(medium)
        segments = parts.placement.segments_by(opened.view.layout)
        prompt = tokenize_prompt(sample.question, parts.tokenizer, parts.placeholders, segments)
        batch = opened.batch(prompt)
        assert generate(opened.model, batch, **options)[0].tolist() == theirs
        # The likelihood of an answer from shared keys and values is that of the text as a whole.
        answer = theirs[:3]
        whole = prompt.input_ids + answer
        positions = prompt.positions
        if positions:
            positions = [[*row, *(row[-1] + 1 + step for step in range(len(answer)))] for row in positions]
        full = opened.batch(replace(prompt, input_ids=whole, positions=positions))
        beside = {"position_ids": full.position_ids} if positions else {}
        if opened.name in PREFIX:
            beside["token_type_ids"] = answer_types(full.attention_mask, [len(prompt.input_ids)])
        with torch.no_grad():
            own = opened.model(full.input_ids, full.features, attention_mask=full.attention_mask, **beside).logits
        rows = own[0, len(prompt.input_ids) - 1 : -1]
        expected = rows.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum()
        torch.testing.assert_close(
            answer_log_probabilities(opened.model, batch, [answer])[0, 0], expected, atol=1e-4, rtol=1e-4
        )


def test_questions_of_other_lengths_beside_it_change_no_answer(opened):
    parts, medium = opened.components, opened.media[0]
    assistant = Assistant(opened.model, parts.tokenizer, parts.placeholders, parts.encoders)
    short = opened.sample(medium).question
    longer = (Message("user", ("Describe the picture. " * 4, *opened.sample(medium, seed=1).question[0].content)),)
    batch = [short, longer, (Message("user", ("What is this?",)),)]
    alone = [assistant.answers([messages], max_new_tokens=6)[0] for messages in batch]
    assert assistant.answers(batch, max_new_tokens=6) == alone


def test_rows_are_shared_where_they_are_exact(opened):
    for medium in opened.media:
        kind, line = base_row_kind(opened.model, opened.components, [(medium,)], share=True, segments=True)
        assert kind is RowKind.SHARED and type(opened.native).__name__ in line


def test_routers_of_a_base_keep_rows_from_being_shared(tmp_path, monkeypatch):
    opened = Opened("qwen2_vl", tmp_path / "base")
    config = opened.model.causal_lm.config.get_text_config()
    monkeypatch.setattr(config, "output_router_logits", False, raising=False)
    monkeypatch.setattr(config, "router_aux_loss_coef", 0.01, raising=False)
    kind, line = base_row_kind(opened.model, opened.components, [("image",)], share=True, segments=True)
    assert kind is RowKind.SEGMENTS and "rows that are segments: the auxiliary loss of its routers" in line


@pytest.mark.parametrize(("name", "exact"), [("qwen2_5_omni", True), ("phi4_multimodal", False)])
def test_media_that_a_task_shows_together_are_tried_together(tmp_path, name, exact):
    if missing := ZOO[name].missing:
        pytest.skip(f"its processor needs {', '.join(missing)}")
    opened = Opened(name, tmp_path / "base")
    shown = [("image",), ("image", "audio")]
    if exact:
        base_row_kind(opened.model, opened.components, shown, share=True, segments=True)
    else:  # beside a picture its recordings go through another projector
        with pytest.raises(ModelError, match="with image and audio in one sample can't be trained here"):
            base_row_kind(opened.model, opened.components, shown, share=True, segments=True)


def test_a_leak_between_samples_is_noticed(opened, monkeypatch):
    """The trial with a plan in which each sample sees the one before it."""
    from finetune.training import base_trial

    def leaking(*args, **kwargs):
        batch = collate(*args, **kwargs)
        plan = batch.get("row_plan")
        if plan is not None:
            first, *others = plan.segments
            batch["row_plan"] = type(plan)(
                (first, *(one._replace(prefix_begin=first.begin, prefix_end=one.begin) for one in others))
            )
        return batch

    collate = base_trial.Collator.__call__
    monkeypatch.setattr(base_trial.Collator, "__call__", leaking)
    medium = opened.media[0]
    kind, _ = base_row_kind(opened.model, opened.components, [(medium,)], share=True, segments=True)
    assert kind in (RowKind.PACKED, RowKind.PADDED)


def test_roles_cover_what_features_come_from(opened):
    for medium, roles in opened.model.roles.items():
        if medium == "video":
            continue
        names = dict(opened.model.causal_lm.named_parameters())
        language = language_modules(opened.model.causal_lm)
        decoder = {id(parameter) for module in language for parameter in module.parameters(recurse=False)}
        assert roles.encoder and roles.projector and not set(roles.encoder) & set(roles.projector)
        assert not any(id(names[name]) in decoder for name in (*roles.encoder, *roles.projector))
        # Moving any of the projector's weights moves the features; a whole number of layers is the encoder's.
        prepared = opened.components.encoders[medium].prepare(_example(medium))
        before = opened.model.encode(medium, [prepared.values])[0].clone()
        kept = names[roles.projector[0]].detach().clone()
        with torch.no_grad():
            names[roles.projector[0]].add_(torch.randn_like(kept))
        assert not torch.equal(opened.model.encode(medium, [prepared.values])[0], before)
        with torch.no_grad():
            names[roles.projector[0]].copy_(kept)
        assert math.isfinite(float(before.sum()))


def _example(medium):
    from finetune.data.media import example

    return example(medium)


def test_plain_peft_loads_our_adapter_on_the_native_class(opened, tmp_path):
    """In a process that never imports ours: tests/training/test_existing_model_run.py."""
    inputs = native_inputs(opened.processor, conversation(opened.name, opened.media[0]))
    assert_plain_peft_is_ours(opened.components, opened.native, inputs, tmp_path)


def test_plain_peft_loads_our_adapter_on_voxtral(tmp_path):
    folder = family_folder("voxtral", tmp_path / "base")
    settings = base_settings(ZOO["voxtral"], folder)
    parts = load_components(Model(base=Base(**settings)), {}, 0, CPU)
    inputs = native_inputs(native_processor(folder), conversation("voxtral"))
    assert_plain_peft_is_ours(parts, native_model(folder), inputs, tmp_path / "adapter")


def assert_plain_peft_is_ours(parts, native, inputs, folder):
    """The native model with an adapter of ours, by PEFT's classes and none of ours, computes what ours does."""
    model = build_model(parts, Adapter(rank=2), seed=0, bindings={}, with_encoders=False)
    torch.manual_seed(1)
    lora = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    with torch.no_grad():
        for parameter in lora:
            parameter.normal_(std=0.1)
    save_trained(model.eval(), folder)
    with torch.no_grad():
        bare = native(**inputs).logits
        plain = PeftModel.from_pretrained(native, folder).eval()
        tuned = plain(**inputs).logits
        ours = model.language_model(**inputs).logits
    assert {type(module).__module__.split(".")[0] for module in plain.modules()} <= {"torch", "transformers", "peft"}
    assert sum("lora_B" in name for name, _ in plain.named_parameters()) == len(lora) > 0
    plain.unload()
    torch.testing.assert_close(tuned, ours, atol=1e-5, rtol=1e-5)
    assert (tuned - bare).abs().max() > 1e-2


def test_an_adapter_lies_in_the_decoder_alone(tmp_path):
    folder = family_folder("gemma3", tmp_path / "base")
    components = load_components(Model(base=Base(name=str(folder), quantize="none")), {}, 0, CPU)
    model = build_model(components, Adapter(rank=4), seed=0, bindings={}, with_encoders=False)
    inside = {id(parameter) for parameter in model.decoder.parameters()}
    lora = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert len(lora) == 2 * 7 * 6 and all(id(parameter) in inside for parameter in lora)


def test_a_decoder_that_holds_its_encoders_is_told_from_them(tmp_path):
    """Phi-4-multimodal: its `get_decoder()` is the model that pictures and recordings enter."""
    model = native_model(family_folder("phi4_multimodal", tmp_path))
    assert beside_language(model) == ["model.embed_tokens_extend", "lm_head"]
    extended = model.model.embed_tokens_extend
    assert encoder_of(model, "image") is extended.image_embed.img_processor
    assert encoder_of(model, "audio") is extended.audio_embed.encoder
    layers = {f"model.layers.{number}." for number in range(2)}
    assert {name[: len("model.layers.0.")] for name in linear_layers(model, "all-linear")} == layers
