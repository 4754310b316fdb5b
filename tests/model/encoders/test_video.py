"""Frames through vision backbones, and video transformers, against the backbones and transformers themselves."""

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import tiny_encoder, tiny_picture
from tiny_encoders import KINDS, tiny_clip, tiny_encoder_of

from finetune.common.errors import ModelError
from finetune.data.sample import Layout
from finetune.model.encoders import video, video_transformer
from finetune.model.encoders._vision import pool_grid


def encode(encoder, values: torch.Tensor) -> torch.Tensor:
    """Values of one clip -> features (S, L, W)."""
    with torch.no_grad():
        return encoder.encode(values[None])[0]


def noisy_clip(frames: int, size: tuple[int, int] = (40, 30)):
    from finetune.data.media.video import Clip

    random = np.random.default_rng(0)
    pictures = tuple(
        PIL.Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(frames)
    )
    return Clip(pictures, tuple(0.4 * number for number in range(frames)))


# Frames


@pytest.mark.parametrize("kind", ["siglip", "dinov2_registers", "resnet"])
def test_a_frame_is_seen_as_a_picture_and_pooled(kind):
    torch.manual_seed(3)
    picture = tiny_encoder(kind)
    encoder = video.wrap(picture.module, picture.processor, video.Options(name="tiny"))
    clip = noisy_clip(3)
    features = encode(encoder, encoder.prepare(clip).values)
    assert features.shape == (3, 4, encoder.width)
    for frame, rows in zip(clip.frames, features, strict=True):
        grid = encode(picture, picture.prepare(frame).values)[0].view(4, 4, -1)
        for number in range(4):
            down, across = 2 * (number // 2), 2 * (number % 2)
            region = grid[down : down + 2, across : across + 2]
            torch.testing.assert_close(rows[number], region.mean((0, 1)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind, pool, rows", [("siglip", 0, 16), ("siglip", 1, 1), ("siglip", 3, 9), ("siglip", 9, 16)])
@pytest.mark.parametrize("frames", [1, 5])
def test_rows_of_a_frame(kind, pool, rows, frames):
    encoder = tiny_encoder_of("siglip_frames", pool=pool)
    prepared = encoder.prepare(tiny_clip(frames))
    assert prepared.layout.rows == rows
    assert encode(encoder, prepared.values).shape == (frames, rows, encoder.width)


def test_a_convolution_s_single_row_is_not_multiplied():
    encoder = tiny_encoder_of("mobilenet_v2_frames", pool=2)
    prepared = encoder.prepare(tiny_clip(2))
    assert prepared.layout.rows == 1 == encode(encoder, prepared.values).shape[1]


def test_pooling_is_the_mean_of_regions_that_need_not_divide_the_grid():
    rows = torch.randn(2, 5 * 3, 7)
    pooled = pool_grid(rows, (5, 3), 2)
    grid = rows.view(2, 5, 3, 7)
    expected = [
        grid[:, down, across].mean((1, 2))
        for down in (slice(0, 3), slice(2, 5))
        for across in (slice(0, 2), slice(1, 3))
    ]
    torch.testing.assert_close(pooled, torch.stack(expected, 1))


def test_the_time_of_every_frame_stands_before_it():
    clip = tiny_clip(3)
    assert tiny_encoder_of("siglip_frames").prepare(clip).layout == Layout(4, ("0.0s ", "0.5s ", "1.0s "))
    assert tiny_encoder_of("siglip_frames", time=False).prepare(clip).layout == Layout(4, ("", "", ""))


def test_which_frames_are_asked_for():
    assert tiny_encoder_of("siglip_frames").sampling == {"count": 8}
    assert tiny_encoder_of("siglip_frames", frames=None, per_second=0.5).sampling == {"per_second": 0.5}


@pytest.mark.parametrize("options", [{"per_second": 1.0}, {"frames": None}])
def test_frames_are_counted_or_per_second(options):
    with pytest.raises(ValueError, match="one of `frames` and `per_second`"):
        video.Options(name="some/name", **options)


def test_more_frames_than_are_seen_at_once_change_nothing():
    encoder, clip = tiny_encoder_of("siglip_frames"), noisy_clip(70)
    values = encoder.prepare(clip).values
    alone = torch.cat([encode(encoder, values[number : number + 1]) for number in range(70)])
    torch.testing.assert_close(encode(encoder, values), alone, atol=1e-5, rtol=1e-4)


# Video transformers


@pytest.mark.parametrize("label", ["videomae", "vjepa2"])
@pytest.mark.parametrize("pool, rows", [(2, 4), (0, 16), (1, 1)])
def test_a_clip_is_seen_as_transformers_does_and_pooled_slot_by_slot(label, pool, rows):
    encoder, clip = tiny_encoder_of(label, pool=pool), noisy_clip(4)
    prepared = encoder.prepare(clip)
    assert prepared.layout == Layout(rows, ("0.0s ", "0.8s ")) and encoder.sampling == {"count": 4}
    own = encoder.processor(list(clip.frames), return_tensors="pt")["pixel_values"]
    assert torch.equal(prepared.values, own[0])
    with torch.no_grad():
        hidden = (
            encoder.module(own).last_hidden_state if label == "videomae" else encoder.module.get_vision_features(own)
        )
    slots = hidden[0].view(2, 4, 4, -1)
    features = encode(encoder, prepared.values)
    side = pool or 4
    for number in range(rows):
        size = 4 // side
        down, across = number // side * size, number % side * size
        expected = slots[:, down : down + size, across : across + size].mean((1, 2))
        torch.testing.assert_close(features[:, number], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "frames, taken", [(1, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (3, [0, 1, 1, 2]), (4, [0, 1, 2, 3]), (8, [1, 3, 5, 7])]
)
@pytest.mark.parametrize("label", ["videomae", "vjepa2"])
def test_a_clip_of_another_length_shows_its_nearest_frames(label, frames, taken):
    encoder, clip = tiny_encoder_of(label), noisy_clip(frames)
    prepared = encoder.prepare(clip)
    whole = encoder.processor(list(clip.frames), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(prepared.values, whole[taken])
    assert prepared.layout.marks == tuple(f"{clip.seconds[index]:.1f}s " for index in taken[::2])


def test_a_layout_without_times_is_known_before():
    encoder = tiny_encoder_of("videomae", time=False)
    assert encoder.layout == Layout(4, ("", "")) == encoder.prepare(tiny_clip(1)).layout
    assert tiny_encoder_of("videomae").layout is None


def test_vjepa2_takes_other_numbers_of_frames_and_videomae_does_not():
    encoder = tiny_encoder_of("vjepa2", frames=6)
    prepared = encoder.prepare(tiny_clip(6))
    assert encoder.sampling == {"count": 6}
    assert encode(encoder, prepared.values).shape == (3, 4, encoder.width)
    with pytest.raises(ModelError, match="doesn't answer like a video transformer"):
        tiny_encoder_of("videomae", frames=6)
    with pytest.raises(ModelError, match="multiple of 2"):
        tiny_encoder_of("vjepa2", frames=5)


def test_a_folder_without_figures_for_its_frames_is_refused(tmp_path):
    KINDS["videomae"][1]()[0].save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="preprocessor_config"):
        video_transformer.build(video_transformer.Options(name=str(tmp_path)), torch.float32, torch.device("cpu"))


def test_a_frame_is_scaled_before_it_is_cropped():
    """As V-JEPA 2's own processor, which needs torchvision: shorter side to 36, the middle 32 x 32 kept."""
    encoder = tiny_encoder_of("vjepa2")
    picture = PIL.Image.new("RGB", (72, 36), (255, 0, 0))
    picture.paste((0, 0, 255), (20, 0, 52, 36))
    from finetune.data.media.video import Clip

    values = encoder.prepare(Clip((picture,), (0.0,))).values
    assert values.shape == (4, 3, 32, 32)
    assert values[:, 2].min() > values[:, 0].max()  # blue all over: the red sides are cropped off
    assert tiny_picture().size == (40, 30)
