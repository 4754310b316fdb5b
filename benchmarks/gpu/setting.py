"""Options of a run, which each check gets."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TINY_LLM = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SMALL_LLM = {
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
TINY_VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
CLIP_L_336 = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Setting:
    """`folder`: where the processes of all checks meet. `toy`: everything as small as in tests."""

    folder: Path
    device: str
    toy: bool

    @property
    def small_llm(self) -> dict[str, int]:
        """The shape of the LLMs whose results are checked."""
        return TINY_LLM if self.toy else SMALL_LLM

    @property
    def large_llm(self) -> dict[str, int]:
        """The shape of the LLM whose training is timed."""
        from benchmarks.train_vs_trl.prepare import LARGE_LLM  # with torch, which not every reader needs

        return TINY_LLM | {"num_hidden_layers": 1, "vocab_size": 416} if self.toy else LARGE_LLM

    @property
    def vision(self) -> dict[str, Any]:
        return TINY_VISION if self.toy else CLIP_L_336

    def save(self) -> None:
        (self.folder / "setting.json").write_text(json.dumps(asdict(self), default=str), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Setting":
        saved = json.loads((folder / "setting.json").read_text(encoding="utf-8"))
        return cls(**{**saved, "folder": folder})
