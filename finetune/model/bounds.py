"""Bounds on the sizes in a config. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from finetune.common.errors import ModelError

# The largest numbers under keys that hold these words: several times what published models have.
LIMITS = {
    "layers": 1000,
    "n_layer": 1000,
    "depth": 1000,
    "heads": 4096,
    "n_head": 4096,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "experts": 2**14,
}


def refuse_oversized(config: Mapping[str, Any], where: str) -> None:
    """Raises ModelError for a config of more layers, or wider ones, than any model has: building them would not
    end before the weights are found not to fit. `where`: the model of the config.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            refuse_oversized(value, where)
        most = next((most for word, most in LIMITS.items() if word in str(key)), None)
        if most is not None and isinstance(value, int) and value > most:
            raise ModelError(f"{where}: its config says {key}: {value:,}, and {most:,} is the most that is built")
