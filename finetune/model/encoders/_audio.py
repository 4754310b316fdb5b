"""What the encoders of sound share: resampling and cutting a recording into windows."""

from math import ceil
from typing import TYPE_CHECKING

from finetune.data.media.audio import RATE

if TYPE_CHECKING:
    import numpy as np

WINDOW_SECONDS = (
    "Longest stretch encoded at once, in seconds; a longer recording is cut into equal windows, each a segment."
)
KINDS_OF_SOUND = (
    "`kind: whisper` reads Whisper, `kind: wave` wav2vec 2.0, HuBERT and WavLM, `kind: spectrogram` AST and CLAP"
)


def cut_windows(audio: "np.ndarray", longest: int, unit: int = 1, shortest: int = 1) -> "np.ndarray":
    """(samples,) -> (windows, size): the fewest equal windows of at most `longest` samples, `size` being a multiple of
    `unit`. Zeros pad the last window: fewer than `windows * unit` of them, unless the recording has fewer than
    `shortest` samples.
    """
    import numpy as np

    count, size = window_sizes(len(audio), longest, unit, shortest)
    return np.pad(audio, (0, count * size - len(audio))).reshape(count, size)


def window_sizes(samples: int, longest: int, unit: int = 1, shortest: int = 1) -> tuple[int, int]:
    """(windows, samples per window)."""
    samples = max(samples, shortest, unit)
    count = ceil(samples / longest)
    return count, ceil(samples / count / unit) * unit


def resampled(audio: "np.ndarray", rate: int) -> "np.ndarray":
    """16 kHz -> `rate` samples per second."""
    if rate == RATE:
        return audio
    import soxr

    resampled_audio: np.ndarray = soxr.resample(audio, RATE, rate)
    return resampled_audio
