"""Merged models that several files export: never written to."""

import pytest
from tiny import part, tiny_encoder, tiny_recipe
from tiny_encoders import tiny_encoder_of
from tiny_merged import tiny_merged

import finetune


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A trained, evaluated and merged run that LLaVA's class fits; its LLM is in ../llm."""
    folder = tmp_path_factory.mktemp("run")
    recipe = finetune.load_recipe(tiny_recipe(folder, model__projectors={"image": {"kind": "mlp"}}))
    path = finetune.train(recipe, folder / "run").path
    finetune.evaluate(path)
    finetune.merge(path)
    return path


@pytest.fixture(scope="session")
def merged(tmp_path_factory):
    """A merged folder with two encoders, which only the kit's own class holds."""
    encoders = {"image": tiny_encoder(), "video": tiny_encoder_of("siglip_frames")}
    projectors = {"image": part("projectors", "mlp"), "video": part("projectors", "linear")}
    return tiny_merged(tmp_path_factory.mktemp("bare") / "model", encoders, projectors, louder=4.0)
