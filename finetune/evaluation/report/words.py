"""Values in words that a reader takes in at once."""

import json
import math
from pathlib import PurePath
from typing import Any

CONDITIONS = {
    "tuned": "after training",
    "base": "the same parts before training",
    "blank": "after training, with nothing to see or hear: grey pictures, silence",
    "shuffled": "after training, with another row's media",
    "probe": "logistic regression on the encoder's features, without the LLM",
}
KINDS = {"image": ("picture", "pictures"), "audio": ("recording", "recordings"), "video": ("video", "videos")}


def number(value: Any) -> str:
    """'0.626', '12,345', '–' for nothing, or what isn't finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–" if value is None or isinstance(value, float) else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def memory(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def energy(joules: float) -> str:
    return f"{joules / 3600:,.2f} Wh ({joules:,.0f} J)"


def plain(name: str) -> str:
    """A metric's, condition's or part's name: 'character_error_rate' in words."""
    return name.replace("_", " ")


def less_is_better(metric: str) -> bool:
    return "error" in metric


def meaning(condition: str) -> str:
    """What a condition is."""
    kind = condition.removeprefix("blank_")
    if condition != kind and kind in KINDS:
        return f"after training, with nothing in the {KINDS[kind][1]}"
    return CONDITIONS.get(condition, "")


def shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def said(prediction: Any) -> str:
    """A prediction, or what it is scored against, as one reads it."""
    if prediction is None:
        return ""
    if isinstance(prediction, str):
        return prediction
    if isinstance(prediction, list) and all(isinstance(item, str) for item in prediction):
        return ", ".join(prediction)
    if isinstance(prediction, dict) and "label" in prediction:
        label = said(prediction["label"])
        sure = confidence(prediction)
        return f"{label} ({sure:.0%})" if sure is not None and isinstance(prediction["label"], str) else label
    if isinstance(prediction, int | float):
        return number(prediction)
    if isinstance(prediction, dict) and all(isinstance(value, str | int | float) for value in prediction.values()):
        return ", ".join(f"{key}: {said(value)}" for key, value in prediction.items())
    return json.dumps(prediction, ensure_ascii=False)


def confidence(prediction: Any) -> float | None:
    """The probability of the label that was chosen; None where no probabilities were given."""
    chances = prediction.get("probabilities") if isinstance(prediction, dict) else None
    return max(chances.values()) if isinstance(chances, dict) and chances else None


def short_path(name: Any) -> str:
    """A path without the folders of this machine; anything else as it is."""
    path = PurePath(str(name))
    return "/".join(path.parts[-2:]) if path.is_absolute() else str(name)


def options(mapping: dict[str, Any], *leave_out: str) -> str:
    """'rank 16, alpha 32', without what is off."""
    shown = {
        key: value for key, value in mapping.items() if key not in leave_out and value not in (None, False, "", {})
    }
    return ", ".join(
        f"{plain(key)} {short_path(value) if value is not True else 'yes'}" for key, value in shown.items()
    )
