"""Media that a program holds are decoded as their files are."""

import numpy as np
import pytest
from media_files import sine, sound, video

from finetune.common.errors import MediaError
from finetune.data.media import decode
from finetune.recipe.schema import Limits


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_samples_give_the_recording_of_their_file(rate):
    samples = sine(rate).astype(np.float32)
    expected = decode("audio", sound(samples, rate, subtype="FLOAT"))
    for held in ((samples, rate), {"array": samples.astype(np.float64), "sampling_rate": rate}):
        np.testing.assert_array_equal(decode("audio", held), expected)


@pytest.mark.parametrize("sampling", [{"count": 3}, {"per_second": 2.0}, {}])
def test_frames_give_the_clip_of_their_file(sampling):
    content = video()
    whole = decode("video", content)
    rate = 1 / (whole.seconds[1] - whole.seconds[0])
    frames = np.stack([np.asarray(frame) for frame in whole.frames])
    clip, expected = decode("video", (frames, rate), **sampling), decode("video", content, **sampling)
    assert clip.seconds == pytest.approx(expected.seconds)
    for frame, other in zip(clip.frames, expected.frames, strict=True):
        np.testing.assert_array_equal(np.asarray(frame), np.asarray(other))


@pytest.mark.parametrize(
    ("kind", "held", "words"),
    [
        ("audio", sine(), "an array .* of float64; give a path"),
        ("audio", (np.zeros((2, 9), np.float32), 16_000), r"an array \(2, 9\)"),
        ("audio", (np.zeros(9, np.int16), 16_000), "of int16"),
        ("audio", (np.zeros(9, np.float32), 5), "5 samples a second"),
        ("audio", (np.full(9, np.nan, np.float32), 16_000), "aren't finite"),
        ("audio", (np.zeros(0, np.float32), 16_000), "empty"),
        ("audio", (np.zeros(16_000 * 3, np.float32), 16_000), "at most 2 s"),
        ("video", (np.zeros((2, 4, 4), np.uint8), 25), r"an array \(2, 4, 4\)"),
        ("video", (np.zeros((2, 4, 4, 3), np.uint8), 0), "how many a second"),
        ("video", (np.zeros((0, 4, 4, 3), np.uint8), 25), "give"),
        ("video", (np.zeros((75, 4, 4, 3), np.uint8), 25), "at most 2 s"),
        ("video", (np.zeros((9, 4, 4, 3), np.uint8), 25), "9 frames; at most 8"),
        ("image", np.zeros((0, 4, 3), np.uint8), "nothing to see|0 pixels"),
    ],
)
def test_other_objects_and_what_is_out_of_bounds_are_refused(kind, held, words):
    with pytest.raises(MediaError, match=words):
        decode(kind, held, limits=Limits(max_seconds=2, max_frames=8))
