"""Reads a folder of transformers without accepting weights that don't fit."""

from pathlib import Path
from typing import Any

from finetune.common.errors import ArtifactError


def load_exactly(model_class: Any, folder: Path, **kwargs: Any) -> Any:
    """`model_class.from_pretrained(folder, dtype="auto", **kwargs)`, refused if any of its weights don't fit.

    transformers would initialize missing weights at random and ignore unexpected ones. Raises ArtifactError with the
    first missing, unexpected and mismatched keys.
    """
    model, report = model_class.from_pretrained(folder, output_loading_info=True, **{"dtype": "auto", **kwargs})
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    if wrong := {kind: sorted(report[kind])[:3] for kind in kinds if report[kind]}:
        raise ArtifactError(f"{folder}: weights don't fit the config: {wrong}")
    return model
