import json

import pytest
import torch
from tiny import BACKBONES, tiny_encoder, tiny_picture, tiny_vision_folder

from finetune.encoders import vision
from finetune.errors import ModelError

# Tokens in front of the 4 x 4 patches: class, registers.
IN_FRONT = {"siglip": 0, "clip": 1, "dinov2": 1, "dinov2_registers": 4, "dinov3": 5, "vit": 1, "aimv2": 0}
CONVOLUTIONS = {"mobilenet_v2": 1, "convnext": 1, "resnet": 16}  # rows of a 32 x 32 picture
kinds = pytest.mark.parametrize("kind", BACKBONES)


def encoded(encoder, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.stack([encoder.prepare(tiny_picture((60 * number, 90, 200))) for number in range(count)])
    with torch.no_grad():
        return pixels, encoder.encode(pixels)


@pytest.mark.parametrize("kind", IN_FRONT)
def test_class_and_register_tokens_are_dropped(kind):
    encoder = tiny_encoder(kind)
    pixels, features = encoded(encoder)
    with torch.no_grad():
        hidden = encoder.module(pixel_values=pixels).last_hidden_state
    assert hidden.shape[1] == 16 + IN_FRONT[kind]
    assert torch.equal(features, hidden[:, IN_FRONT[kind] :])
    assert (encoder.width, encoder.rows) == (16, 16)


@pytest.mark.parametrize("kind", IN_FRONT)
def test_all_tokens_are_kept_when_asked_for(kind):
    encoder = tiny_encoder(kind, tokens="all")
    assert encoder.rows == 16 + IN_FRONT[kind] == encoded(encoder)[1].shape[1]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_give_their_grid_row_by_row(kind):
    encoder = tiny_encoder(kind)
    pixels, features = encoded(encoder)
    with torch.no_grad():
        grid = encoder.module(pixel_values=pixels).last_hidden_state
    height, width = grid.shape[2:]
    assert height * width == encoder.rows == CONVOLUTIONS[kind]
    assert grid.shape[1] == encoder.width
    for row in range(height):
        for column in range(width):
            assert torch.equal(features[:, row * width + column], grid[:, :, row, column])


@kinds
def test_an_earlier_layer_is_the_hidden_state_of_transformers(kind):
    encoder = tiny_encoder(kind, layer=-2)
    pixels, features = encoded(encoder)
    with torch.no_grad():
        hidden = encoder.module(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    expected = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden[:, IN_FRONT[kind] :]
    assert torch.equal(features, expected)
    assert features.shape[1:] == (encoder.rows, encoder.width)


@kinds
def test_an_encoder_is_rebuilt_from_its_settings_and_weights(kind):
    encoder = tiny_encoder(kind)
    settings = json.loads(json.dumps(encoder.settings()))  # as they stand in config.json
    other = vision.restore(settings, torch.float32)
    pixels, features = encoded(encoder)
    assert other.fingerprint != encoder.fingerprint
    other.module.load_state_dict(encoder.module.state_dict())
    assert torch.equal(encoded(other)[0], pixels)
    assert torch.equal(encoded(other)[1], features)
    assert (other.width, other.rows, other.skipped) == (encoder.width, encoder.rows, encoder.skipped)


@kinds
def test_an_encoder_is_read_from_an_ordinary_folder(kind, tmp_path):
    folder = tiny_vision_folder(tmp_path, kind)
    built = vision.build(vision.Options(name=str(folder)), torch.float32, torch.device("cpu"))
    torch.manual_seed(1)
    expected = tiny_encoder(kind)
    torch.testing.assert_close(encoded(built)[1], encoded(expected)[1], atol=1e-6, rtol=0)
    assert built.fingerprint == vision.build(built.options, torch.float32, torch.device("cpu")).fingerprint
    assert not any(p.requires_grad for p in built.module.parameters()) and not built.module.training


def test_the_vision_tower_of_a_pair_is_taken(tmp_path):
    import transformers
    from tiny import SQUARE, VIT

    text = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    pair = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VIT)).eval()
    pair.save_pretrained(tmp_path)
    transformers.SiglipImageProcessor(size=SQUARE).save_pretrained(tmp_path)
    encoder = vision.build(vision.Options(name=str(tmp_path)), torch.float32, torch.device("cpu"))
    pixels, features = encoded(encoder)
    with torch.no_grad():
        assert torch.equal(features, pair.vision_model(pixel_values=pixels).last_hidden_state)


def test_a_picture_of_any_size_takes_the_rows_told_before():
    from pathlib import Path

    from finetune.data.sample import Medium

    encoder = tiny_encoder()
    for size in ((1, 1), (500, 20), (32, 32)):
        pixels = encoder.prepare(tiny_picture(size=size))
        assert encoder.encode(pixels[None]).shape == (1, encoder.length(Medium("image", Path("x.png"))), encoder.width)


@pytest.mark.parametrize("name", ["no/such", "llm"])
def test_what_is_no_vision_backbone_is_a_model_error(name, tmp_path):
    from tiny import tiny_llm_folder

    folder = tiny_llm_folder(tmp_path / "llm") if name == "llm" else tmp_path / name
    with pytest.raises(ModelError, match=f"encoder '{folder}'"):
        vision.build(vision.Options(name=str(folder)), torch.float32, torch.device("cpu"))
