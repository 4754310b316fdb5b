"""What `finetune/model/encoders/__init__.py` promises, over a model of every family."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_picture
from tiny_encoders import KINDS, medium_of, tiny_clip, tiny_encoder_folder, tiny_encoder_of, tiny_medium, tiny_sound

from finetune.common.errors import ModelError
from finetune.common.registry import load_part
from finetune.data.sample import Layout
from finetune.model.encoders._transformers import fingerprint

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
MEDIA = {
    "image": [tiny_picture(size=size) for size in ((1, 1), (40, 30), (1, 50), (500, 10))],
    "audio": [
        *(np.zeros(count, np.float32) for count in (1, 1600, 16_000)),
        *(tiny_sound(seconds) for seconds in (0.1, 1.37, 31)),
    ],
    "video": [tiny_clip(frames, size) for frames, size in ((1, (40, 30)), (3, (200, 8)), (8, (8, 200)))],
}
every = pytest.mark.parametrize("label", KINDS)
# One of each part, where what is tested is the part's and not the family's.
one_of_each = pytest.mark.parametrize("label", ["siglip", "whisper", "wav2vec2", "ast", "siglip_frames", "videomae"])


def encode(encoder, values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return encoder.encode(values)


def built(folder, label: str, dtype: torch.dtype = torch.float32, **options):
    part = load_part("encoders", KINDS[label][0])
    return part.build(part.Options(name=str(folder), **options), dtype, CPU)


@every
def test_features_have_the_shape_that_was_told_before(label):
    encoder = tiny_encoder_of(label)
    for medium in MEDIA[medium_of(label)]:
        prepared = encoder.prepare(medium)
        assert prepared.values.dtype == torch.float32 and prepared.values.device.type == "cpu"
        features = encode(encoder, prepared.values[None])
        assert features.shape == (1, len(prepared.layout.marks), prepared.layout.rows, encoder.width)
        assert features.isfinite().all()
        assert encoder.layout in (None, Layout(prepared.layout.rows, prepared.layout.marks))


@every
def test_features_do_not_depend_on_other_media(label):
    encoder = tiny_encoder_of(label)
    values = torch.stack([encoder.prepare(tiny_medium(label, seed)).values for seed in range(3)])
    together = encode(encoder, values)
    # A random MobileNet is blind to colour; all others see or hear that media differ.
    assert "mobilenet" in label or not torch.allclose(together[0], together[1], atol=1e-4)
    for number in range(3):
        alone = encode(encoder, values[number : number + 1])[0]
        torch.testing.assert_close(together[number], alone, atol=1e-5, rtol=1e-4)


@every
def test_an_encoder_is_rebuilt_from_its_settings_and_weights(label):
    encoder = tiny_encoder_of(label)
    settings = json.loads(json.dumps(encoder.settings()))  # as they stand in config.json
    other = load_part("encoders", KINDS[label][0]).restore(settings, torch.float32)
    assert other.fingerprint != encoder.fingerprint
    other.module.load_state_dict(encoder.module.state_dict())
    ours, theirs = (one.prepare(tiny_medium(label)) for one in (encoder, other))
    assert torch.equal(ours.values, theirs.values) and ours.layout == theirs.layout
    assert torch.equal(encode(encoder, ours.values[None]), encode(other, ours.values[None]))
    assert (other.width, other.layout, other.sampling) == (encoder.width, encoder.layout, encoder.sampling)
    assert fingerprint(other.module, other.settings()) == encoder.fingerprint
    assert not any(p.requires_grad for p in other.module.parameters()) and not other.module.training


@every
def test_an_encoder_is_rebuilt_without_memory_for_its_weights(label):
    encoder = tiny_encoder_of(label)
    with torch.device("meta"):
        other = load_part("encoders", KINDS[label][0]).restore(encoder.settings(), torch.float32)
        ours, theirs = (one.prepare(tiny_medium(label)).layout for one in (encoder, other))
    assert (other.width, ours) == (encoder.width, theirs)
    assert all(parameter.is_meta for parameter in other.module.parameters() if parameter.ndim > 1)


@every
def test_an_encoder_is_read_from_the_folder_of_a_whole_model(label, tmp_path):
    encoder = built(tiny_encoder_folder(tmp_path, label), label)
    expected = tiny_encoder_of(label)
    ours, theirs = (one.prepare(tiny_medium(label)) for one in (encoder, expected))
    assert torch.equal(ours.values, theirs.values) and ours.layout == theirs.layout
    features = encode(encoder, ours.values[None])
    torch.testing.assert_close(features, encode(expected, ours.values[None]), atol=1e-6, rtol=0)
    assert not any(p.requires_grad for p in encoder.module.parameters()) and not encoder.module.training


@every
def test_half_precision_is_the_module_s_own(label, tmp_path):
    encoder = built(tiny_encoder_folder(tmp_path, label), label, torch.bfloat16)
    values = encoder.prepare(tiny_medium(label)).values[None]
    features = encode(encoder, values)
    assert features.dtype == torch.bfloat16
    other = load_part("encoders", KINDS[label][0]).restore(encoder.settings(), torch.bfloat16)
    other.module.load_state_dict(encoder.module.state_dict())
    assert torch.equal(encode(other, values), features)


@one_of_each
def test_a_fingerprint_is_of_weights_and_options_and_not_of_the_path(label, tmp_path):
    one, same, other = (tiny_encoder_folder(tmp_path / str(n), label, seed) for n, seed in enumerate((1, 1, 2)))
    options = {
        "siglip": {"tiles": 2},
        "whisper": {"window_seconds": 20.0},
        "wav2vec2": {"layer": -2},
        "ast": {},
        "siglip_frames": {"frames": 4},
        "videomae": {"pool": 1},
    }[label]
    first = built(one, label).fingerprint
    assert len(first) == 64 and first == built(same, label).fingerprint != built(other, label).fingerprint
    assert not options or first != built(one, label, **options).fingerprint


def without(folder, *names: str) -> None:
    """Take weights whose names contain one of `names` out of a folder."""
    file = folder / "model.safetensors"
    kept = {key: tensor for key, tensor in load_file(file).items() if not any(name in key for name in names)}
    assert len(kept) < len(load_file(file))
    save_file(kept, file, metadata={"format": "pt"})


@pytest.mark.parametrize("label, unread", [("siglip", "head"), ("wav2vec2", "masked_spec_embed"), ("vjepa2", "pred")])
def test_weights_that_no_feature_depends_on_may_be_missing(label, unread, tmp_path):
    folder = tiny_encoder_folder(tmp_path, label)
    expected = built(folder, label)
    without(folder, unread)
    encoder = built(folder, label)
    values = expected.prepare(tiny_medium(label)).values[None]
    assert torch.equal(encode(encoder, values), encode(expected, values))
    assert all(parameter.isfinite().all() for parameter in encoder.module.parameters())
    assert encoder.fingerprint == built(folder, label).fingerprint


@pytest.mark.parametrize(
    "label, read",
    [
        ("siglip", "layers.1.mlp.fc1.bias"),
        ("whisper", "encoder.conv2.weight"),
        ("wav2vec2", "layers.2.layer_norm.weight"),
        ("ast", "layernorm.bias"),
        ("clap", "audio_encoder.norm.weight"),
        ("videomae", "patch_embeddings.projection.bias"),
    ],
)
def test_weights_that_features_depend_on_must_be_there(label, read, tmp_path):
    without(tiny_encoder_folder(tmp_path, label), read)
    with pytest.raises(ModelError, match=f"{tmp_path}.*can't be loaded: . weights? of .* aren't in its files"):
        built(tmp_path, label)


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in KINDS.values()}))
@pytest.mark.parametrize("wrong", ["no/such", "llm"])
def test_what_is_no_such_model_is_a_model_error(kind, wrong, tmp_path):
    from tiny import tiny_llm_folder

    folder = tiny_llm_folder(tmp_path / "llm") if wrong == "llm" else tmp_path / wrong
    part = load_part("encoders", kind)
    with pytest.raises(ModelError, match=f"encoder '{folder}'"):
        part.build(part.Options(name=str(folder)), torch.float32, CPU)
