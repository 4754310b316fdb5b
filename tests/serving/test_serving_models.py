"""Several models in one process: adapters on one LLM share it and answer as each does alone."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import part, tiny_encoder
from tiny_merged import tiny_merged
from tiny_serving import ask_all, request, serving
from trained_runs import change_json

import finetune
from finetune.common.errors import ArtifactError, ModelError
from finetune.data.sample import Medium, Message
from finetune.serving.engine.models import load_models

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(finished_run):
    return finished_run("plain") / "adapter"


def changed(folder, to, file, **content):
    """A copy with changed values in a JSON file."""
    shutil.copytree(folder, to)
    change_json(to / file, **content)
    return to


@pytest.fixture(scope="module", params=["none", "nf4"])
def adapters(request, trained, tmp_path_factory):
    """Two adapters on the same LLM; the second one's trained weights are perturbed."""
    place = tmp_path_factory.mktemp(request.param)
    model = json.loads((trained / "multimodal.json").read_text())["model"]
    model["llm"]["quantize"] = request.param
    first = changed(trained, place / "first", "multimodal.json", model=model)
    second = changed(trained, place / "second", "multimodal.json", model=model)
    for name in ("adapter_model.safetensors", "projectors.safetensors"):
        torch.manual_seed(5)
        tensors = {key: t + 0.3 * torch.randn_like(t) for key, t in load_file(second / name).items()}
        save_file(tensors, second / name, {"format": "pt"})
    return {"first": first, "second": second}


def questions(trained):
    images = sorted((trained.parents[1] / "data" / "images").glob("test*.png"))[:4]
    texts = ("What is this?", "Describe the picture.")
    return [(Message("user", (Medium("image", path), text)),) for path in images for text in texts]


def base_weights(assistant):
    parameters = assistant.model.causal_lm.named_parameters()
    return {name.replace(".base_layer", ""): p for name, p in parameters if "lora_" not in name}


def test_adapters_on_one_llm_share_it_and_answer_as_alone(adapters, trained):
    together = load_models(adapters)
    first, second = (base_weights(together[name]) for name in adapters)
    assert first.keys() == second.keys()
    assert all(first[name].data_ptr() == second[name].data_ptr() for name in first)
    assert together["first"].encoders["image"] is together["second"].encoders["image"]
    assert all(isinstance(one.model.language_model, PeftModel) for one in together.values())
    requests = questions(trained)
    expected = {}
    for name, folder in adapters.items():
        assistant = finetune.load(folder)
        expected[name] = [assistant.answers([q], max_new_tokens=8)[0] for q in requests]
    assert expected["first"] != expected["second"]
    requests = [request(q, 8, model=name) for q in requests for name in adapters]
    with serving(together) as engine:
        answers = [text.strip() for text, *_ in ask_all(engine, requests)]
        assert engine.stats().counters["media_cache_misses"] == 4  # they share the encoder
    for place, name in enumerate(adapters):
        assert answers[place :: len(adapters)] == expected[name]


def test_an_adapter_and_a_merged_model(trained, tmp_path):
    encoders, projectors = {"image": tiny_encoder()}, {"image": part("projectors", "pixel_shuffle")}
    tiny_merged(tmp_path / "run" / "merged", encoders, projectors)
    models = load_models({"run": tmp_path / "run", "adapter": trained})
    assert not hasattr(models["run"].model.language_model, "peft_config")
    requests = [request(q, 6, model=name) for q in questions(trained)[:3] for name in models]
    with serving(models) as engine:
        answers = [text.strip() for text, *_ in ask_all(engine, requests)]
    assert answers == [models[r.model].answers([r.messages], max_new_tokens=6)[0] for r in requests]


def test_adapters_that_modify_their_base_do_not_share_it(trained, tmp_path):
    """PiSSA moves part of the LLM's weights into the adapter; other adapters must not see that."""
    folders = [
        changed(trained, tmp_path / name, "adapter_config.json", init_lora_weights="pissa") for name in ("one", "other")
    ]
    one, other = (base_weights(model) for model in load_models({f.name: f for f in folders}).values())
    name = next(name for name in one if "q_proj" in name)
    assert one[name].data_ptr() != other[name].data_ptr()
    assert torch.equal(one[name], other[name])


def test_a_damaged_adapter_and_an_unknown_source_are_named(adapters, tmp_path):
    broken = changed(adapters["first"], tmp_path / "broken", "multimodal.json", format=99)
    with pytest.raises(ArtifactError, match="format 99"):
        load_models({**adapters, "broken": broken})
    with pytest.raises(ArtifactError, match="nowhere"):
        load_models({**adapters, "nowhere": tmp_path / "nowhere"})
    with pytest.raises(ModelError, match="someone/something"):
        load_models({"hub": "someone/something"})
