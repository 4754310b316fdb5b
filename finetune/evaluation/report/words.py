"""Values as text that a reader takes in at once."""

import math
import re
from collections.abc import Mapping
from pathlib import PurePath

CONDITIONS = {
    "tuned": ("trained", "after training"),
    "base": ("untrained", "before training, with the same components"),
    "blank": ("blank media", "after training, with blank media: grey pictures, silence"),
    "shuffled": ("other media", "after training, with another row's media"),
    "probe": ("linear probe", "logistic regression on the encoder's features, without the LLM"),
}
NAMES = {
    "auroc": "AUROC", "bleu": "BLEU", "chrf": "chrF", "cider": "CIDEr", "f1": "F1", "iou": "IoU", "mrr": "MRR",
    "ndcg": "NDCG", "vqa": "VQA",
}  # fmt: skip
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
    """The name of a metric, condition or component in words: 'character error rate', 'token F1'."""
    return re.sub("[a-z0-9]+", lambda match: NAMES.get(match[0], match[0]), name.replace("_", " "))


def is_share(metric: str) -> bool:
    """Whether a metric is read in percent."""
    return "accuracy" in metric or metric.endswith(("exact_match", "error_rate"))


def value(metric: str, score: float) -> str:
    """'63%', '0.8%'; '0.626' for metrics that aren't shares."""
    if not is_share(metric) or not math.isfinite(score):
        return number(score)
    return f"{score:.0%}" if score in (0, 1) or 0.0995 <= score < 0.995 or score >= 1.005 else f"{score:.1%}"


def span(metric: str, low: float, high: float) -> str:
    """'56–68%'."""
    ends = value(metric, low), value(metric, high)
    return f"{ends[0].removesuffix('%')}–{ends[1]}"


def condition(name: str) -> str:
    """The name of a condition in words: 'untrained'."""
    return _condition(name)[0]


def meaning(name: str) -> str:
    """What a condition is; '' for an unknown one."""
    return _condition(name)[1]


def _condition(name: str) -> tuple[str, str]:
    if name.startswith("blank_"):
        blank = f"blank {NOUNS.get(name.removeprefix('blank_'), ('', 'media'))[1]}"
        return blank, f"after training, with {blank}"
    return CONDITIONS.get(name, (plain(name), ""))


def shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def readable(prediction: object) -> str:
    """A prediction, or its target, as one reads it."""
    if prediction is None:
        return ""
    if isinstance(prediction, str):
        return prediction
    if isinstance(prediction, list):
        return ("; " if any(isinstance(item, dict) for item in prediction) else ", ").join(map(readable, prediction))
    if isinstance(prediction, dict) and "box" in prediction:
        return f"{prediction.get('label') or 'box'} ({', '.join(map(str, prediction['box']))})"
    if isinstance(prediction, dict) and "label" in prediction:
        label, sure = readable(prediction["label"]), confidence(prediction)
        return f"{label} ({sure:.0%})" if sure is not None and isinstance(prediction["label"], str) else label
    if isinstance(prediction, bool):
        return str(prediction).lower()
    if isinstance(prediction, int | float):
        return number(prediction)
    if isinstance(prediction, dict):
        return ", ".join(f"{key}: {readable(inner) or 'none'}" for key, inner in prediction.items())
    return str(prediction)


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
