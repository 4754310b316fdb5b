"""Values as text that a reader takes in at once."""

import json
import math
from collections.abc import Mapping
from pathlib import PurePath

CONDITIONS = {
    "tuned": "after training",
    "base": "before training, with the same components",
    "blank": "after training, with blank media: grey pictures, silence",
    "shuffled": "after training, with another row's media",
    "probe": "logistic regression on the encoder's features, without the LLM",
}
NOUNS = {"image": ("picture", "pictures"), "audio": ("recording", "recordings"), "video": ("video", "videos")}


def number(value: object) -> str:
    """'0.626', '12,345'; '–' for None and for what isn't finite."""
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
    """The name of a metric, condition or component in words: 'character error rate'."""
    return name.replace("_", " ")


def lower_is_better(metric: str) -> bool:
    return "error" in metric


def meaning(condition: str) -> str:
    """What a condition is; '' for an unknown one."""
    kind = condition.removeprefix("blank_")
    if condition != kind and kind in NOUNS:
        return f"after training, with blank {NOUNS[kind][1]}"
    return CONDITIONS.get(condition, "")


def shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def readable(prediction: object) -> str:
    """A prediction, or its target, as one reads it."""
    if prediction is None:
        return ""
    if isinstance(prediction, str):
        return prediction
    if isinstance(prediction, list) and all(isinstance(item, str) for item in prediction):
        return ", ".join(prediction)
    if isinstance(prediction, dict) and "label" in prediction:
        label, sure = readable(prediction["label"]), confidence(prediction)
        return f"{label} ({sure:.0%})" if sure is not None and isinstance(prediction["label"], str) else label
    if isinstance(prediction, int | float):
        return number(prediction)
    if isinstance(prediction, dict) and all(isinstance(value, str | int | float) for value in prediction.values()):
        return ", ".join(f"{key}: {readable(value)}" for key, value in prediction.items())
    return json.dumps(prediction, ensure_ascii=False)


def confidence(prediction: object) -> float | None:
    """The probability of the predicted label; None for a prediction without probabilities."""
    probabilities = prediction.get("probabilities") if isinstance(prediction, dict) else None
    return max(probabilities.values()) if isinstance(probabilities, dict) and probabilities else None


def label_of(value: object) -> object:
    """The label of a prediction with probabilities; anything else as it is."""
    return value.get("label", value) if isinstance(value, dict) else value


def short_path(name: object) -> str:
    """A path without the folders of this machine; anything else as text."""
    path = PurePath(str(name))
    return "/".join(path.parts[-2:]) if path.is_absolute() else str(name)


def options(values: Mapping[str, object]) -> str:
    """'rank 16, alpha 32.0', without what is off."""
    return ", ".join(
        f"{plain(key)} {short_path(value) if value is not True else 'yes'}"
        for key, value in values.items()
        if value not in (None, False, "", {}, [])
    )
