"""The small families are what they stand for: transformers' own processors and classes load, read and answer them."""

import pytest
import torch
from families import ZOO, conversation, family_folder
from families.native import native_inputs, native_model, native_processor


@pytest.fixture(scope="module", params=ZOO)
def native(request, tmp_path_factory):
    folder = family_folder(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, native_model(folder), native_processor(folder)


def cases(name):
    return [medium for medium in ZOO[name].media if medium != "video"]  # video processors need torchvision


def test_a_conversation_has_a_loss_and_what_is_shown_is_felt(native):
    name, model, processor = native
    for medium in cases(name):
        answers = []
        for seed in (0, 1):
            inputs = native_inputs(processor, conversation(name, medium, seed=seed))
            with torch.no_grad():
                output = model(**inputs, labels=inputs["input_ids"])
            assert torch.isfinite(output.loss) and output.logits.shape[:2] == inputs["input_ids"].shape
            answers.append(output.logits[0, -8:])
        assert (answers[0] - answers[1]).abs().max() > 1e-3
