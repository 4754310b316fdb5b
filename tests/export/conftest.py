"""Merged models that several files export."""

import pytest
from tiny import part, tiny_encoder
from tiny_encoders import tiny_encoder_of
from tiny_merged import tiny_merged
from trained_runs import copy_of


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    """A run that LLaVA's class fits; a copy, since exports are written into it."""
    return copy_of(finished_run("plain"), tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def llm(finished_run):
    """The folder of that run's LLM."""
    return finished_run("plain").parent / "llm"


@pytest.fixture(scope="session")
def merged(tmp_path_factory):
    """A merged folder with two encoders, which only the kit's own class holds."""
    encoders = {"image": tiny_encoder(), "video": tiny_encoder_of("siglip_frames")}
    projectors = {"image": part("projectors", "mlp"), "video": part("projectors", "linear")}
    return tiny_merged(tmp_path_factory.mktemp("bare") / "model", encoders, projectors, louder=4.0)
