"""Named unlike the encoders' test_video.py: pytest takes a file's name for its module."""

import numpy as np
import PIL.Image
import pytest
from media_files import coded_sound, moov_first, patched, picture, video

from finetune.common.errors import MediaError
from finetune.data.media import blank, decode
from finetune.data.media.video import Clip, decode_video
from finetune.recipe.schema import Limits

GREYS = list(range(20, 220, 10))  # 20 frames, 10 a second
MADE = {
    "mp4": {},
    "mkv": {"form": "matroska"},
    "webm": {"form": "webm", "codec": "libvpx-vp9"},
    "vp8": {"form": "webm", "codec": "libvpx"},
    "avi": {"form": "avi", "codec": "mpeg4"},
    "ts": {"form": "mpegts", "codec": "mpeg2video"},
    "flv": {"form": "flv", "codec": "flv"},
    "wmv": {"form": "asf", "codec": "wmv2"},
    "mov": {"form": "mov", "codec": "mjpeg", "pixels": "yuvj420p"},
    "gif": {"form": "gif", "codec": "gif", "pixels": "rgb8"},
    "one-keyframe": {"options": {"g": "250", "sc_threshold": "0"}},
    "open-groups": {"options": {"x264-params": "open-gop=1:keyint=5:bframes=3"}},
}


def shown(clip: Clip) -> list[int]:
    """Which of GREYS each frame is, by its number."""
    means = [np.asarray(frame, float).mean() for frame in clip.frames]
    numbers = [round((mean - GREYS[0]) / 10) for mean in means]
    assert all(abs(mean - GREYS[number]) < 5 for mean, number in zip(means, numbers, strict=True))
    return numbers


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("count", [1, 3, 4, 7, 20, 50])
def test_count_takes_the_middle_of_equal_parts(made, count):
    clip = decode_video(video(GREYS, **MADE[made]), count=count)
    middles = [int((part + 0.5) * 20 / count) for part in range(count)] if count < 20 else list(range(20))
    assert shown(clip) == middles
    np.testing.assert_allclose(clip.seconds, [number / 10 for number in middles], atol=2e-3)
    assert all(frame.mode == "RGB" and frame.size == (64, 48) for frame in clip.frames)


@pytest.mark.parametrize("made", MADE)
def test_per_second_takes_what_is_seen_at_each_time(made):
    clip = decode_video(video(GREYS, **MADE[made]), per_second=4)
    assert shown(clip) == [0, 2, 5, 7, 10, 12, 15, 17]  # at 0, 0.25, 0.5 s, ...
    np.testing.assert_allclose(clip.seconds, [number / 10 for number in shown(clip)], atol=2e-3)


def test_at_more_per_second_than_there_are_each_frame_comes_once():
    assert shown(decode_video(video(GREYS), per_second=25)) == list(range(20))
    assert shown(decode_video(video(GREYS))) == list(range(20))


def test_a_varying_rate_is_told_by_the_seconds():
    content = video([20, 60, 100, 140, 180], form="matroska", milliseconds=[0, 10, 500, 1000, 3000])
    clip = decode_video(content, per_second=1)  # at 0, 1, 2 and 3 s
    assert shown(clip) == [0, 12, 16] and clip.seconds == (0.0, 1.0, 3.0)
    assert decode_video(content, count=5).seconds == (0.0, 0.01, 0.5, 1.0, 3.0)


def test_a_clip_that_begins_late_begins_at_zero():
    content = video(GREYS[:3], form="matroska", milliseconds=[5000, 5100, 5200])
    np.testing.assert_allclose(decode_video(content).seconds, [0, 0.1, 0.2])


@pytest.mark.parametrize("size", [(2, 2), (16, 800), (800, 16)])
def test_a_single_frame_of_any_shape(size):
    clip = decode_video(video([120], size=size), count=8)
    assert shown(clip) == [10] and clip.frames[0].size == size and clip.seconds == (0.0,)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_turns_frames_upright(rotation):
    picture_of_halves = np.zeros((48, 64, 3), np.uint8)
    picture_of_halves[:24] = 220  # bright above
    plain, turned = (decode_video(halves(picture_of_halves, turn)).frames[0] for turn in (0, rotation))
    turns = {90: PIL.Image.Transpose.ROTATE_90, 180: PIL.Image.Transpose.ROTATE_180}
    upright = plain.transpose(turns.get(rotation, PIL.Image.Transpose.ROTATE_270))
    assert turned.size == upright.size
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(upright))


def halves(values: np.ndarray, rotation: int) -> bytes:
    import io

    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(values).reformat(format="yuv420p")))
        container.mux(stream.encode(None))
    return file.getvalue()


def test_rotation_of_a_phone_held_upright_is_clockwise():
    """The matrix that phones write for 90 degrees clockwise: (0, 1; -1, 0)."""
    values = np.zeros((48, 64, 3), np.uint8)
    values[:24] = 220
    one = 0x10000
    content = patched(halves(values, 0), b"tkhd", 40, ">9i", 0, one, 0, -one, 0, 0, 0, 0, 0x40000000)
    frame = np.asarray(decode_video(content).frames[0], int)
    assert frame.shape == (64, 48, 3)
    assert frame[:, 40:].mean() > 200 and frame[:, :8].mean() < 20  # above has become right


def test_transparent_frames_lie_over_white():
    clear = PIL.Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    solid = PIL.Image.new("RGBA", (20, 10), (200, 0, 0, 255))
    content = picture("GIF", clear, save_all=True, append_images=[solid], duration=100, disposal=2)
    first, second = decode_video(content).frames
    assert first.getpixel((5, 5)) == (255, 255, 255) and second.getpixel((5, 5)) == (200, 0, 0)


@pytest.mark.parametrize(
    ("limits", "sampling", "said"),
    [
        (Limits(max_bytes=100), {}, r"bytes; at most 100 are read \(`media\.max_bytes`\)"),
        (Limits(max_pixels=3000), {}, r"64x48 pixels; at most 3,000 are decoded \(`media\.max_pixels`\)"),
        (Limits(max_seconds=1.5), {}, r"2\.0 s or more; at most 1\.5 s are read \(`media\.max_seconds`\)"),
        (Limits(max_frames=19), {}, r"20 frames; at most 19 are decoded \(`media\.max_frames`\)"),
        (Limits(max_frames=3), {"count": 4}, r"4 frames; at most 3"),
        (Limits(max_frames=7), {"per_second": 4}, r"8 frames; at most 7"),
        (Limits(max_pixels=3072), {}, r"more than 49,152 pixels together"),
    ],
)
def test_every_limit_is_kept(limits, sampling, said):
    with pytest.raises(MediaError, match=r"rows\.csv:7: .*" + said):
        decode("video", video(GREYS), where="rows.csv:7", limits=limits, **sampling)


def test_what_is_no_video_is_named():
    for content, said in (
        (coded_sound(), "no video in it"),
        (picture(), "not in a supported format"),
        (b"#EXTM3U", "opened"),
    ):
        with pytest.raises(MediaError, match=rf"rows\.csv:7: .*{said}"):
            decode("video", content, where="rows.csv:7")


def test_a_file_that_ends_early_is_refused():
    content = moov_first(video(GREYS))
    for share in (0.7, 0.9, 0.97):
        with pytest.raises(MediaError, match="cut off"):
            decode_video(content[: int(len(content) * share)])


def test_a_file_and_its_bytes_give_the_same(tmp_path):
    (tmp_path / "a.mp4").write_bytes(video(GREYS))
    from_file, from_bytes = decode_video(tmp_path / "a.mp4", count=4), decode_video(video(GREYS), count=4)
    assert from_file.seconds == from_bytes.seconds and from_file.frames == from_bytes.frames


def test_the_blank_has_the_same_frames_and_nothing_on_them():
    clip = decode_video(video(GREYS), count=3)
    grey = blank("video", clip)
    assert grey.seconds == clip.seconds and [f.size for f in grey.frames] == [f.size for f in clip.frames]
    assert {frame.getpixel((3, 3)) for frame in grey.frames} == {(127, 127, 127)}
