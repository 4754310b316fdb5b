"""The media of a base by its config, before anything large is loaded. Imports no torch."""

from collections.abc import Mapping
from typing import Any

SECTIONS = {"image": ("vision_config", "vit_config"), "audio": ("audio_config", "encoder_config")}


def media_in_config(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The media that a model of this config (`config.json`) takes: image, audio, video."""
    inner = config.get("thinker_config")
    if isinstance(inner, Mapping):
        return media_in_config(inner)

    def has(*keys: str) -> bool:
        return any(config.get(key) is not None for key in keys)

    found = [kind for kind, sections in SECTIONS.items() if has(*sections, f"{kind}_token_id", f"{kind}_token_index")]
    return (*found, *(["video"] if has("video_token_id", "video_token_index") else []))
