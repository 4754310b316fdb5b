"""The small families are what they stand for: transformers' own processors and classes load, read and answer them. What
its accessors give is written down here: a new version that changes it is noticed.
"""

import inspect

import pytest
import torch
from families import ZOO, conversation, family_folder
from families.native import native_inputs, native_model, native_processor

PROJECTED_IN_THE_TOWER = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2_5_omni"}
NO_ENCODER = {"granite_speech", "phi4_multimodal"}  # `get_encoder` gives the model itself
NO_FEATURES = {"qwen2_audio", "phi4_multimodal"}  # no `get_audio_features`, no `get_image_features`


@pytest.fixture(scope="module", params=ZOO)
def native(request, tmp_path_factory):
    if missing := ZOO[request.param].missing:
        pytest.skip(f"its processor needs {', '.join(missing)}")
    folder = family_folder(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, native_model(folder), native_processor(folder)


def media_of(name):
    return [medium for medium in ZOO[name].media if medium != "video"]  # video processors need torchvision


def test_a_conversation_has_a_loss_and_what_is_shown_is_felt(native):
    name, model, processor = native
    for medium in media_of(name):
        answers = []
        for seed in (0, 1):
            inputs = native_inputs(processor, conversation(name, medium, seed=seed))
            with torch.no_grad():
                output = model(**{**inputs, "labels": inputs["input_ids"]})
            assert torch.isfinite(output.loss) and output.logits.shape[:2] == inputs["input_ids"].shape
            answers.append(output.logits[0, -3:])
        assert (answers[0] - answers[1]).abs().max() > 1e-3


def test_each_row_of_features_has_its_placeholder(native):
    name, model, processor = native
    for medium in media_of(name):
        features_of = getattr(model.base_model, f"get_{medium}_features", None)
        assert (features_of is None) == (name in NO_FEATURES)
        if features_of is None:
            continue
        inputs = native_inputs(processor, conversation(name, medium))
        taken = {key: value for key, value in inputs.items() if key in inspect.signature(features_of).parameters}
        with torch.no_grad():
            features = features_of(**taken).pooler_output
        rows = torch.cat([part.flatten(0, -2) for part in features]) if not torch.is_tensor(features) else features
        rows = rows.flatten(0, -2)
        width = model.get_input_embeddings().embedding_dim
        placeholders = int((inputs["input_ids"] == getattr(model.config, f"{medium}_token_id")).sum())
        assert rows.shape == (placeholders, width) and placeholders > 0


def test_the_parts_are_found_by_role(native):
    name, model, _ = native
    decoder = model.get_decoder()
    assert (decoder is model.base_model) == (name == "phi4_multimodal")
    for medium in media_of(name):
        encoder = model.get_encoder(modality=medium)
        assert (encoder is model) == (name in NO_ENCODER)
        if encoder is not model:
            within = {id(parameter) for part in (decoder, encoder) for parameter in part.parameters()}
            within |= {id(parameter) for parameter in model.get_output_embeddings().parameters()}
            outside = [key for key, parameter in model.named_parameters() if id(parameter) not in within]
            outside = [key for key in outside if not key.startswith(("model.audio_tower", "model.visual"))]
            assert bool(outside) == (name not in PROJECTED_IN_THE_TOWER), outside
