"""Encoders that don't stay frozen: LoRA on them, or their last layers; and every part at its own learning rate."""

import json
import re
import shutil

import pytest
import torch
import yaml
from packed import composite_with_lora, train_composite, weights_of
from safetensors.torch import load_file
from tiny import tiny_recipe
from tiny_encoders import KINDS, tiny_audio_folder, tiny_encoder_of, tiny_medium
from trained_runs import copy_of, trained

import finetune
from finetune.common.certificate import read_certificate
from finetune.common.errors import ModelError, RecipeError
from finetune.merging import candidates as _candidates
from finetune.model.build import load_components
from finetune.model.trainable import set_trainable
from finetune.model.tuned_encoder import tune_encoder
from finetune.recipe.schema import EncoderTuning

pytestmark = pytest.mark.slow

LAYERED = [label for label in KINDS if label not in ("mobilenet_v2", "mobilenet_v2_frames", "clap", "clap_fused")]
TUNED = {"lora": {"rank": 2, "alpha": 4}, "last": {"last_layers": 1}}


def encode(encoder, label: str) -> torch.Tensor:
    with torch.no_grad():
        return encoder.encode(encoder.prepare(tiny_medium(label)).values[None])


@pytest.mark.parametrize("label", LAYERED)
def test_the_last_layers_are_those_nearest_to_the_features(label):
    encoder = tiny_encoder_of(label)
    names = tune_encoder(encoder, tiny_medium(label), EncoderTuning(last_layers=1)).names
    (layer,) = {re.search(r"(layers?|stages)\.(\d+)\.", name)[2] for name in names}
    assert layer == ("3" if label == "convnext" else "1" if label == "resnet" else "2")
    for name in names:  # each of them weighs
        before, own = encode(encoder, label), encoder.module.get_parameter(name)
        kept = own.detach().clone()
        with torch.no_grad():
            own.add_(torch.randn_like(own))
        if not name.endswith("k_proj.bias") and not name.endswith("key.bias"):  # softmax doesn't see it
            assert not torch.equal(encode(encoder, label), before), name
        with torch.no_grad():
            own.copy_(kept)
    assert len(tune_encoder(encoder, tiny_medium(label), EncoderTuning(last_layers=2)).names) > len(names)


@pytest.mark.parametrize("label", ["siglip", "whisper", "wav2vec2"])
def test_layers_behind_the_one_that_is_read_are_not_counted(label):
    encoder = tiny_encoder_of(label, layer=-2)
    names = tune_encoder(encoder, tiny_medium(label), EncoderTuning(last_layers=1)).names
    assert names and all("layers.1." in name for name in names)
    with pytest.raises(ModelError, match=r"last_layers is 3, but features of this .* come through 2"):
        tune_encoder(encoder, tiny_medium(label), EncoderTuning(last_layers=3))


@pytest.mark.parametrize("label", ["siglip", "dinov2", "whisper", "wav2vec2", "ast", "videomae", "vjepa2"])
def test_lora_on_an_encoder_begins_as_the_encoder_was(label):
    encoder = tiny_encoder_of(label)
    before = encode(encoder, label)
    tuned = tune_encoder(encoder, tiny_medium(label), EncoderTuning(rank=2))
    assert tuned.names and all(".lora_" in name for name in tuned.names)
    assert not any("head" in name or "predictor" in name for name in tuned.names)  # no feature comes through them
    torch.testing.assert_close(encode(encoder, label), before)
    assert not any(p.requires_grad for p in encoder.module.parameters())


def test_lora_needs_linear_layers():
    with pytest.raises(ModelError, match="ResNetModel has no linear layers for LoRA: write last_layers, not rank"):
        tune_encoder(tiny_encoder_of("resnet"), tiny_medium("resnet"), EncoderTuning(rank=2))


def test_targets_that_are_not_there_are_a_model_error():
    with pytest.raises(ModelError, match=r"PEFT refuses it: .*no_such"):
        tune_encoder(tiny_encoder_of("siglip"), tiny_medium("siglip"), EncoderTuning(rank=2, targets=["no_such"]))


def tuning(folder, how: str, **changes):
    stage = {"name": "tune", "trains": ["projectors", "encoders", "adapter"], "learning_rate": 5.0e-3}
    stage |= {"learning_rates": {"encoders.image": 2.0e-2}, "epochs": 2}
    return tiny_recipe(
        folder, tune_encoders={"image": TUNED[how]}, train__cache=False, train__stages=[stage], **changes
    )


@pytest.fixture(scope="module", params=TUNED)
def merged_run(request, tmp_path_factory):
    """(how the encoder is tuned, a merged run): in a first stage, not in the second. For reading only."""
    path = tuning(tmp_path_factory.mktemp(request.param), request.param)
    recipe = json.loads(path.read_text())
    recipe["train"]["stages"].append({"name": "more", "trains": ["projectors"], "learning_rate": 1.0e-3})
    path.write_text(json.dumps(recipe))
    run = trained(path)
    finetune.merge(run)
    return request.param, run


def test_a_tuned_encoder_goes_the_whole_way(merged_run, tmp_path):
    how, run = merged_run
    stage = json.loads((run / "metrics.json").read_text())["train"]["stages"]["tune"]
    assert set(stage["trained_weights"]) == {"projectors.image", "encoders.image", "adapter"}
    saved = load_file(run / "adapter" / "projectors.safetensors")
    ours = {name.removeprefix("encoders.image."): t for name, t in saved.items() if name.startswith("encoders.")}
    published = load_file(run.parent / "encoder" / "model.safetensors")
    if how == "lora":
        assert ours and all("lora_" in name for name in ours)
        assert all(tensor.any() for name, tensor in ours.items() if "lora_B" in name)
    else:
        known = {name: next(t for key, t in published.items() if key.endswith(name)) for name in ours}
        assert ours and all("layers.2." in name for name in ours)
        assert any(not torch.equal(known[name], tensor) for name, tensor in ours.items())
    scores = finetune.evaluate(copy_of(run, tmp_path)).scores["classify"]["accuracy"]
    assert set(scores) == {"tuned", "base", "blank", "shuffled", "probe"}
    picture = run.parent / "data" / "images" / "test0.png"
    moved = shutil.copytree(run / "merged", tmp_path / "elsewhere")
    merged, adapter = finetune.load(moved), finetune.load(run / "adapter")
    features = []
    for assistant in (merged, adapter):
        encoder = assistant.encoders["image"]
        values = encoder.prepare(finetune.data.media.decode("image", picture)).values[None]
        with torch.no_grad():
            features.append(encoder.encode(values))
        assert isinstance(assistant.answer("What is this?", image=picture, max_new_tokens=3), str)
    torch.testing.assert_close(features[0], features[1], atol=1e-4, rtol=1e-3)
    untouched = finetune.model.encoders.vision.build(
        finetune.model.encoders.vision.Options(name=str(run.parent / "encoder")), torch.float32, torch.device("cpu")
    )
    with torch.no_grad():
        assert not torch.allclose(untouched.encode(values), features[1], atol=1e-3)


def test_a_merged_folder_is_compared_with_what_its_own_encoders_see(merged_run, tmp_path, monkeypatch):
    honest = read_certificate(merged_run[1]).saved
    run = copy_of(merged_run[1], tmp_path)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["merge"] |= {"min_agreement": 0.0, "max_kl": 1e9}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    write = _candidates.write_merged

    def lose_the_encoder(place, llm, tensors, own, run):
        for encoder in run.components.encoders.values():
            for parameter in encoder.module.parameters():
                parameter.data.zero_()
        write(place, llm, tensors, own, run)

    monkeypatch.setattr(_candidates, "write_merged", lose_the_encoder)
    assert honest.kl < 1e-6 < 1e-3 < finetune.merge(run).saved.kl


def test_the_same_seed_gives_the_same_lora_on_an_encoder(tmp_path):
    recipe = finetune.load_recipe(tuning(tmp_path, "lora"))
    first, same, other = (
        load_components(recipe.model, recipe.tune_encoders, seed).encoders["image"].module for seed in (5, 5, 6)
    )
    named = [dict(module.named_parameters()) for module in (first, same, other)]
    new = [name for name in named[0] if "lora_A" in name]
    assert new and all(torch.equal(named[0][name], named[1][name]) for name in new)
    assert not any(torch.equal(named[0][name], named[2][name]) for name in new)


@pytest.mark.parametrize("label", ["dinov2_registers", "convnext", "resnet", "whisper"])
def test_unfrozen_layers_of_a_half_precision_encoder_learn_in_full(label):
    encoder = tiny_encoder_of(label)
    encoder.module.to(torch.bfloat16)
    names = tune_encoder(encoder, tiny_medium(label), EncoderTuning(last_layers=1)).names
    for name in names:
        encoder.module.get_parameter(name).requires_grad_(True)
    features = encoder.encode(encoder.prepare(tiny_medium(label)).values[None])
    features.float().pow(2).sum().backward()
    assert all(encoder.module.get_parameter(name).grad.dtype == torch.float32 for name in names)


def test_a_resumed_stage_goes_on_with_the_tuned_encoder(merged_run, tmp_path):
    """A stage that is done is read back into the encoder, and the next one begins from it."""
    whole = merged_run[1]
    cut = copy_of(whole, tmp_path, "merged")
    shutil.rmtree(cut / "checkpoints" / "more")
    shutil.rmtree(cut / "adapter")
    finetune.train(finetune.load_recipe(whole.parent / "recipe.yaml"), cut, resume=True)
    left, right = (load_file(run / "adapter" / "projectors.safetensors") for run in (whole, cut))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, atol=1e-6, rtol=0, msg=name)


def test_a_tuned_encoder_and_a_cache_of_its_features_exclude_each_other(tmp_path):
    path = tuning(tmp_path, "lora")
    with pytest.raises(RecipeError, match=r"train.cache: .*set train.cache: false"):
        finetune.load_recipe(path, ["train.cache=true"])


@pytest.mark.parametrize("label", ["whisper"])
def test_an_encoder_of_sound_is_tuned_too(label, tmp_path):
    """In the composite exactly the named weights train."""
    folder = tiny_audio_folder(tmp_path / "audio", label)
    encoder = finetune.model.encoders.whisper.build(
        finetune.model.encoders.whisper.Options(name=str(folder)), torch.float32, torch.device("cpu")
    )
    tuned = tune_encoder(encoder, tiny_medium(label), EncoderTuning(rank=2))
    model = composite_with_lora()
    model.encoders["audio"], model.tuned["audio"] = encoder.module, tuned.names
    counts = set_trainable(model, ["encoders.audio"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"encoders.audio.{name}" for name in tuned.names} and list(counts) == ["encoders.audio"]


def test_every_part_moves_at_its_own_rate(tmp_path):
    """Adam's first step moves each weight by the learning rate, whatever its gradient."""
    model = composite_with_lora()
    set_trainable(model, ["projectors", "adapter"])
    before = weights_of(model)
    train_composite(
        model,
        tmp_path,
        rows=[[[number] for number in range(6)]],
        scheduler="constant",
        warmup=0.0,
        weight_decay=0.0,
        learning_rate=1e-3,
        learning_rates={"projectors": 1e-2},
        max_grad_norm=1e9,
    )
    moved = {name: (p - before[name]).abs().max().item() for name, p in weights_of(model).items()}
    for name, distance in moved.items():
        if "lora_A" in name:  # B is zero: no gradient reaches A yet
            continue
        assert distance == pytest.approx(1e-2 if name.startswith("projectors.") else 1e-3, rel=0.02), name
