"""Reading a folder of transformers without accepting weights that don't fit."""

from pathlib import Path
from typing import Any

from finetune.common.errors import ArtifactError


def load_exactly(model_class: Any, folder: Path, **kwargs: Any) -> Any:
    """`model_class.from_pretrained(folder, dtype="auto", **kwargs)`, if the folder has the weights of the class exactly.

    Raises ArtifactError with the first missing, unexpected and mismatched keys otherwise: transformers would initialize
    what is missing at random and ignore what is unexpected.
    """
    model, report = model_class.from_pretrained(folder, output_loading_info=True, **{"dtype": "auto", **kwargs})
    wrong = {
        kind: sorted(report[kind])[:3]
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if report[kind]
    }
    if wrong:
        raise ArtifactError(f"{folder}: weights don't fit the config: {wrong}")
    return model
