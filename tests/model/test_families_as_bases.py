"""Every family as a recipe's base: token ids, logits and loss are those of transformers' own processor and forward."""

from pathlib import Path

import pytest
import torch
from families import ZOO, conversation, family_folder
from families.native import native_inputs, native_model, native_processor
from families.recipes import base_settings

from finetune.data.sample import Medium, Message, Sample
from finetune.model.build import build_model, load_components
from finetune.model.padding import position_ids
from finetune.model.tokenize import tokenize
from finetune.recipe.schema import Model

CASES = [(name, medium) for name, family in ZOO.items() for medium in family.media if medium != "video"]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def case(request, tmp_path_factory):
    name, medium = request.param
    if missing := ZOO[name].missing:
        pytest.skip(f"its processor needs {', '.join(missing)}")
    folder = family_folder(name, tmp_path_factory.mktemp(name) / "base")
    model = Model.model_validate({"base": base_settings(ZOO[name], folder)})
    return name, medium, folder, model


def as_sample(name: str, medium: str, components) -> tuple[Sample, dict]:
    """The conversation as ours, and {its medium: prepared}."""
    messages, prepared = [], {}
    for message in conversation(name, medium):
        content: list = []
        for part in message["content"]:
            if part["type"] == "text":
                content.append(part["text"])
            else:
                content.append(Medium(medium, Path("shown"), known_key="shown", content=part[medium]))
                prepared[medium] = components.encoders[medium].prepare(part[medium])
        messages.append(Message(message["role"], tuple(content)))
    return Sample(tuple(messages), "row"), prepared


def test_ids_logits_and_loss_are_those_of_transformers(case):
    name, medium, folder, settings = case
    components = load_components(settings, {}, 0, torch.device("cpu"))
    sample, prepared = as_sample(name, medium, components)
    segments = components.placement.segments_by(lambda one: prepared[one.kind].layout)
    tokens = tokenize(sample, components.tokenizer, components.placeholders, segments)
    native = native_inputs(native_processor(folder), conversation(name, medium))
    expected = native["input_ids"][0].tolist()
    if name == "llava":  # whose template ends an answer with nothing
        expected.append(components.tokenizer.eos_token_id)
    if name != "llava_onevision":  # whose template writes other white space before an answer than where it asks
        assert tokens.input_ids == expected
    model = build_model(components, None, seed=0, bindings={}, with_encoders=True).float()
    labels = torch.tensor([tokens.labels])
    beside = {"token_type_ids": native["token_type_ids"]} if name == "paligemma" else {}
    if tokens.positions:
        beside["position_ids"] = position_ids(torch.ones_like(labels), torch.tensor(tokens.positions)[:, None])
    with torch.no_grad():
        given = {**native, "input_ids": torch.tensor([tokens.input_ids]), "attention_mask": torch.ones_like(labels)}
        own = native_model(folder)(**{**given, "labels": labels})
        ours = model(
            given["input_ids"],
            media={medium: [prepared[medium].values]},
            labels=labels,
            attention_mask=torch.ones_like(labels),
            **beside,
        )
    assert (ours.logits - own.logits).abs().max() < 1e-5 * own.logits.abs().max()
    assert ours.loss.item() == pytest.approx(own.loss.item(), rel=1e-5)
