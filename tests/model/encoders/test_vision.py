import PIL.Image
import pytest
import torch
import transformers
from tiny import BACKBONES, tiny_backbone, tiny_encoder, tiny_picture

from finetune.common.errors import ModelError
from finetune.data.sample import Layout
from finetune.model.encoders import vision
from finetune.model.encoders._vision import best_grid

# Tokens in front of the 4 x 4 patches: class, registers.
IN_FRONT = {"siglip": 0, "clip": 1, "dinov2": 1, "dinov2_registers": 4, "dinov3": 5, "vit": 1, "aimv2": 0}
CONVOLUTIONS = {"mobilenet_v2": 1, "convnext": 1, "resnet": 16}  # rows of a 32 x 32 picture
kinds = pytest.mark.parametrize("kind", BACKBONES)


def encoded(encoder, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (N, 3, height, width) and features (N, L, W) of pictures in one piece."""
    pixels = torch.stack([encoder.prepare(tiny_picture((60 * number, 90, 200))).values for number in range(count)])
    with torch.no_grad():
        return pixels[:, 0], encoder.encode(pixels)[:, 0]


@pytest.mark.parametrize("kind", IN_FRONT)
def test_class_and_register_tokens_are_dropped(kind):
    encoder = tiny_encoder(kind)
    pixels, features = encoded(encoder)
    with torch.no_grad():
        hidden = encoder.module(pixel_values=pixels).last_hidden_state
    assert hidden.shape[1] == 16 + IN_FRONT[kind]
    assert torch.equal(features, hidden[:, IN_FRONT[kind] :])
    assert (encoder.width, encoder.layout) == (16, Layout(16))


@pytest.mark.parametrize("kind", IN_FRONT)
def test_all_tokens_are_kept_when_asked_for(kind):
    encoder = tiny_encoder(kind, tokens="all")
    assert encoder.layout == Layout(16 + IN_FRONT[kind])
    assert encoded(encoder)[1].shape[1] == 16 + IN_FRONT[kind]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_give_their_grid_row_by_row(kind):
    encoder = tiny_encoder(kind)
    pixels, features = encoded(encoder)
    with torch.no_grad():
        grid = encoder.module(pixel_values=pixels).last_hidden_state
    height, width = grid.shape[2:]
    assert height * width == encoder.layout.rows == CONVOLUTIONS[kind]
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
    assert features.shape[1:] == (encoder.layout.rows, encoder.width)


def test_the_vision_tower_of_a_pair_is_taken(tmp_path):
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


@pytest.mark.parametrize("size", [(1, 1), (40, 30), (10, 500), (500, 10)])
def test_a_picture_in_one_piece_is_what_the_processor_makes_of_it(size):
    encoder, picture = tiny_encoder(), tiny_picture(size=size)
    expected = encoder.processor(images=picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(encoder.prepare(picture).values, expected)


def chequered(columns: int, rows: int, side: int = 32) -> PIL.Image.Image:
    """A picture of columns x rows squares of a colour each."""
    picture = PIL.Image.new("RGB", (columns * side, rows * side))
    for number in range(columns * rows):
        x, y = number % columns * side, number // columns * side
        picture.paste((20 * number, 255 - 20 * number, 7), (x, y, x + side, y + side))
    return picture


@pytest.mark.parametrize("columns, rows", [(2, 1), (1, 2), (3, 2), (2, 3), (1, 6), (6, 1), (2, 2)])
def test_tiles_go_left_to_right_and_top_to_bottom_behind_the_whole(columns, rows):
    encoder, picture = tiny_encoder(tiles=6), chequered(columns, rows)
    prepared = encoder.prepare(picture)
    assert prepared.layout == Layout(16, ("",) * (1 + columns * rows)) and encoder.layout is None
    for number, tile in enumerate(prepared.values[1:]):
        colour = torch.tensor([20 * number, 255 - 20 * number, 7]) / 255
        torch.testing.assert_close(tile.mean((1, 2)) / 2 + 0.5, colour, atol=1e-3, rtol=0)
        assert tile.std((1, 2)).max() < 1e-4
    small = encoder.processor(images=picture.resize((32, 32), 3), return_tensors="pt")["pixel_values"]
    assert torch.equal(prepared.values[:1], small)


def seeded(seed: int, **options):
    torch.manual_seed(seed)
    return tiny_encoder(**options)


def test_a_tile_is_encoded_as_if_it_were_a_picture():
    encoder, tiled = seeded(3), seeded(3, tiles=4)
    picture = chequered(2, 2)
    tile = encoder.prepare(picture.crop((32, 0, 64, 32))).values
    with torch.no_grad():
        expected = encoder.encode(tile[None])[0, 0]
        torch.testing.assert_close(tiled.encode(tiled.prepare(picture).values[None])[0, 2], expected)


# Worked out by hand: width, height, most tiles, grid.
GRIDS = [
    (32, 32, 6, (1, 1)),  # as large as a tile: 2 x 2 would only magnify
    (300, 300, 6, (2, 2)),
    (300, 300, 9, (3, 3)),
    (640, 480, 6, (3, 2)),  # 4:3 lies nearer to 3:2 than to 1:1
    (480, 640, 6, (2, 3)),
    (1000, 20, 6, (6, 1)),
    (20, 1000, 6, (1, 6)),
    (2000, 1000, 12, (4, 2)),
    (60, 30, 12, (2, 1)),
    (1000, 1000, 1, (1, 1)),
]


@pytest.mark.parametrize("width, height, most, grid", GRIDS)
def test_the_grid_has_the_shape_nearest_to_the_picture_s(width, height, most, grid):
    assert best_grid(width / height, width * height / 32**2, most) == grid


@pytest.mark.parametrize("tiles", [1, 6])
@pytest.mark.parametrize("size", [(1, 50), (50, 1), (20, 1000), (1000, 20), (33, 31), (3, 2)])
@pytest.mark.parametrize("kind", ["siglip", "clip", "mobilenet_v2", "convnext"])
def test_a_picture_of_any_shape_takes_the_rows_told_before(kind, size, tiles):
    encoder = tiny_encoder(kind, tiles=tiles)
    prepared = encoder.prepare(tiny_picture(size=size))
    assert len(prepared.values) == len(prepared.layout.marks) <= tiles + 1 and set(prepared.layout.marks) == {""}
    with torch.no_grad():
        features = encoder.encode(prepared.values[None])
    assert features.shape == (1, len(prepared.layout.marks), prepared.layout.rows, encoder.width)


@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "ConvNextImageProcessor", "MobileNetV2ImageProcessor"])
def test_tiles_are_neither_scaled_nor_cropped_again(kind):
    """Processors that scale to more than they keep would cut the edges off every tile."""
    module, _ = tiny_backbone("siglip")
    sizes = {
        "CLIPImageProcessor": {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}},
        "ConvNextImageProcessor": {"size": {"shortest_edge": 32}, "crop_pct": 0.8},
        "MobileNetV2ImageProcessor": {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}},
    }
    processor = getattr(transformers, kind)(**sizes[kind])
    encoder = vision.wrap(module, processor, vision.Options(name="tiny", tiles=4))
    values = encoder.prepare(chequered(2, 2)).values
    assert values.shape == (5, 3, 32, 32)
    assert values[1:].std((2, 3)).max() < 1e-4  # a tile of one colour, to its edges


def test_a_processor_that_keeps_shapes_is_refused():
    module, _ = tiny_backbone("siglip")
    processor = transformers.ViTImageProcessor(size={"shortest_edge": 32})
    with pytest.raises(ModelError, match="differing sizes"):
        vision.wrap(module, processor, vision.Options(name="tiny"))
