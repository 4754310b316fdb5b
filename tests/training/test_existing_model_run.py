"""A base through a whole run: trained, scored, merged, loaded. Its adapter loads with plain PEFT on the native
class.
"""

import csv
import json
import subprocess
import sys
import textwrap

import PIL.Image
import pytest
import torch
from families import ZOO, family_folder
from families.recipes import base_recipe
from safetensors.torch import load_file

import finetune
from finetune.common.errors import ModelError, RecipeError
from finetune.data.sample import Medium, Message
from finetune.evaluation.evaluate import evaluate
from finetune.merging.candidates import read_base_back
from finetune.merging.merge import merge
from finetune.model.prompts import logits
from finetune.recipe.load import Recipe
from finetune.training.train import train

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


def rows(folder, name, count, offset=0):
    with (folder / name).open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "question", "answers"])
        for number in range(offset, offset + count):
            colour = list(COLOURS)[number % 3]
            shade = tuple(value - number for value in COLOURS[colour])  # no two rows are equal
            PIL.Image.new("RGB", (48 + 8 * (number % 2), 40), shade).save(folder / f"{number}.png")
            writer.writerow([f"{number}.png", "What is this?", colour])
    return folder / name


def recipe(folder, base, *, quantize="nf4", trains=("adapter",), tune=None, **changes):
    return Recipe(
        name="base",
        model={"base": {"name": str(base), "quantize": quantize}},
        adapter={"rank": 4},
        tune_encoders={"image": tune} if tune else {},
        data=[
            {"path": str(rows(folder, "train.csv", 12)), "task": "vqa"},
            {"path": str(rows(folder, "test.csv", 4, 12)), "task": "vqa", "split": "test"},
        ],
        train={
            "tokens_per_batch": 256,
            "cache": "projectors" not in trains,
            "cache_folder": str(folder / "features"),
            "stages": [{"name": "tune", "trains": list(trains), "learning_rate": 2e-3, "epochs": 2}],
        }
        | changes,
        evaluate={"max_new_tokens": 4},
        merge={"rows": 4, "rows_scored": 2, "min_agreement": 0.5, "max_kl": 5.0},
    )


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl", "gemma3"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    base = family_folder(request.param, folder / "published")
    trained = train(recipe(folder, base, trains=("projectors", "adapter")), run=folder / "run")
    return folder, base, trained


def test_what_trains_is_what_the_recipe_names(run):
    _, base, trained = run
    names = set(load_file(trained.adapter / "projectors.safetensors"))
    before = load_file(base / "model.safetensors")
    assert names and all(name.startswith("base.model.") and "vision_tower" not in name for name in names)
    assert all("merger" in name or "multi_modal_projector" in name for name in names)
    lora = set(load_file(trained.adapter / "adapter_model.safetensors"))
    assert lora and all(".language_model.layers." in name for name in lora)
    assert before  # the published folder is left alone


def test_it_is_scored_merged_and_loads(run):
    folder, base, trained = run
    scores = evaluate(trained.path)
    assert "vqa" in str(scores)
    certificate = merge(trained.path)
    assert certificate.saved.agreement == 1.0
    config = json.loads((trained.merged / "config.json").read_text())
    assert config["architectures"] == json.loads((base / "config.json").read_text())["architectures"]
    assert "quantization_config" not in config
    published, written = (load_file(place / "model.safetensors") for place in (base, trained.merged))
    assert {name: one.shape for name, one in published.items()} == {name: one.shape for name, one in written.items()}
    frozen = [name for name in published if "visual.blocks" in name or "vision_tower" in name]
    assert frozen and all(torch.equal(published[name], written[name]) for name in frozen)
    question = {"image": str(folder / "12.png"), "max_new_tokens": 4}
    merged, adapter = finetune.load(trained.path), finetune.load(trained.adapter)
    assert merged.answer("What is this?", **question) == adapter.answer("What is this?", **question)


def test_a_merged_base_without_room_in_memory_is_read_from_disk(run, tmp_path, monkeypatch):
    folder, _, trained = run
    merged = trained.merged if trained.merged.is_dir() else merge(trained.path) and trained.merged
    question = Message("user", (Medium("image", folder / "12.png"), "What is this?"))
    whole, _ = read_base_back(merged, torch.device("cpu"), tmp_path)
    monkeypatch.setattr("finetune.merging.candidates.place_for", lambda *_: None)
    model, on_disk = read_base_back(merged, torch.device("cpu"), tmp_path)
    assert on_disk and any(p.device.type == "meta" for p in model.decoder.parameters())
    assistant = finetune.load(merged)
    expected, found = (logits(one, assistant.batch([[question]])) for one in (whole, model))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("tuning", [{"last_layers": 1}, {"rank": 2}])
def test_an_encoder_of_a_base_trains(tuning, tmp_path):
    base = family_folder("gemma3", tmp_path / "published")
    changed = recipe(tmp_path, base, quantize="none", trains=("encoders", "adapter", "projectors"), tune=tuning)
    trained = train(changed, run=tmp_path / "run")
    own = load_file(trained.adapter / "projectors.safetensors")
    lora = load_file(trained.adapter / "adapter_model.safetensors")
    in_tower = [name for name in {**own, **lora} if "vision_tower" in name]
    if "rank" in tuning:
        assert in_tower and all("lora_" in name for name in in_tower)
        assert {lora[name].shape[0] for name in in_tower if "lora_A" in name} == {2}
    else:
        assert in_tower and all(".layers.2." in name for name in in_tower)  # the last of three
        before = load_file(base / "model.safetensors")
        name = next(name for name in in_tower if name.endswith("fc1.weight"))
        published = next(key for key in before if key.endswith(name.partition("vision_tower")[2]))
        assert not torch.equal(own[name], before[published])
    merge(trained.path)
    question = {"image": str(tmp_path / "12.png"), "max_new_tokens": 4}
    merged, adapter = finetune.load(trained.path), finetune.load(trained.adapter)
    assert merged.answer("What is this?", **question) == adapter.answer("What is this?", **question)


PLAIN = """
    import json, sys
    import torch, transformers
    from peft import PeftModel

    base, adapter, inputs, out = sys.argv[1:]
    name = json.load(open(base + "/config.json"))["architectures"][0]
    model = getattr(transformers, name).from_pretrained(base, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        torch.save(model(**torch.load(inputs)).logits, out)
    assert not any(module.split(".")[0] == "finetune" for module in sys.modules)
"""


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_the_adapter_loads_with_plain_peft_on_the_native_class(family, tmp_path):
    from families import conversation
    from families.native import native_inputs, native_processor

    base = family_folder(family, tmp_path / "published")
    trained = train(recipe(tmp_path, base, quantize="none"), run=tmp_path / "run")
    inputs = dict(native_inputs(native_processor(base), conversation(family)))
    torch.save(inputs, tmp_path / "inputs.pt")
    out = tmp_path / "logits.pt"
    script = [
        sys.executable,
        "-c",
        textwrap.dedent(PLAIN),
        str(base),
        str(trained.adapter),
        str(tmp_path / "inputs.pt"),
    ]
    subprocess.run([*script, str(out)], check=True, cwd=tmp_path)
    ours = finetune.load(trained.adapter).model.language_model
    with torch.no_grad():
        tuned = ours(**inputs).logits
        with ours.disable_adapter():
            bare = ours(**inputs).logits
    torch.testing.assert_close(torch.load(out), tuned, atol=1e-5, rtol=1e-5)
    assert (tuned - bare).abs().max() > 1e-2


def test_rows_of_a_medium_that_the_base_lacks_are_refused_before_weights_are_read(tmp_path):
    base = family_folder("qwen2_audio", tmp_path / "published")
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"takes audio, and data\.0 has image"):
        train(recipe(tmp_path, base), run=tmp_path / "run")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"base": "org/name", "encoders": {"image": {"kind": "vision", "name": "org/tower"}}}, "has its own encoders"),
        ({"base": "org/name", "llm": {"name": "org/llm"}}, "write llm, with encoders and projectors, or base"),
        ({"base": {"name": "org/name", "trust_remote_code": True}}, "unknown key"),
        ({}, "write llm, with encoders and projectors, or base"),
    ],
)
def test_conflicts_are_told_when_the_recipe_is_read(model, message, tmp_path):
    path = rows(tmp_path, "train.csv", 3)
    with pytest.raises(RecipeError, match=message):
        Recipe(
            name="base",
            model=model,
            data=[{"path": str(path), "task": "vqa", "hold_out": 0.3}],
            train={"stages": [{"name": "tune", "trains": ["adapter"], "learning_rate": 1e-3}]},
        )


@pytest.mark.parametrize("spoilt", ["own code", "no processor"])
def test_a_base_that_can_not_be_loaded_is_one_message_before_weights_are_read(spoilt, tmp_path):
    base = family_folder("llava", tmp_path / "published")
    path = base_recipe(tmp_path, ZOO["llava"], base, "image")
    (base / "model.safetensors").unlink()
    if spoilt == "own code":
        config = json.loads((base / "config.json").read_text())
        config |= {"model_type": "new", "architectures": ["New"], "auto_map": {"AutoConfig": "new.C"}}
        (base / "config.json").write_text(json.dumps(config))
    else:
        for file in base.glob("*processor*.json"):
            file.unlink()
    words = {"own code": "it comes with code of its own.*; take", "no processor": "it has no processor: copy"}[spoilt]
    for begin in (finetune.check, lambda recipe: finetune.train(recipe, tmp_path / "run")):
        with pytest.raises(ModelError, match=f"base '.*published' can't be loaded: {words}") as caught:
            begin(path)
        assert len(str(caught.value).splitlines()) == 1


def test_features_of_projectors_that_train_are_not_cached(tmp_path):
    with pytest.raises(RecipeError, match=r"stores projected features.*train.cache: false"):
        recipe(tmp_path, "org/name", trains=("projectors",), cache=True)
