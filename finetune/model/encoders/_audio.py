"""Sound in windows, for every encoder of it."""

from math import ceil
from typing import TYPE_CHECKING

from finetune.data.media.audio import RATE

if TYPE_CHECKING:
    import numpy as np


def cut_windows(audio: "np.ndarray", longest: int, unit: int = 1, shortest: int = 1) -> "np.ndarray":
    """(samples,) -> (windows, size): as few equal windows as there must be for none to be longer than `longest`
    samples, a multiple of `unit`. The last is padded with zeros: by less than `windows * unit` samples, or where there
    are fewer than `shortest`.
    """
    import numpy as np

    count, size = window_sizes(len(audio), longest, unit, shortest)
    return np.pad(audio, (0, count * size - len(audio))).reshape(count, size)


def window_sizes(samples: int, longest: int, unit: int = 1, shortest: int = 1) -> tuple[int, int]:
    """(windows, samples of each)."""
    samples = max(samples, shortest, unit)
    count = ceil(samples / longest)
    return count, ceil(samples / count / unit) * unit


def resampled(audio: "np.ndarray", rate: int) -> "np.ndarray":
    """16 kHz -> `rate` samples a second."""
    if rate == RATE:
        return audio
    import soxr

    return soxr.resample(audio, RATE, rate)
