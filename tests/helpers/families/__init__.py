"""Small random models of published multimodal families, with the files that their folders have on the Hub."""

from pathlib import Path

import numpy as np
import PIL.Image

from families.family import Family, write_family
from families.gemma import GEMMA3
from families.idefics import IDEFICS3, SMOLVLM
from families.internvl import INTERNVL
from families.llava import LLAVA, LLAVA_NEXT, LLAVA_ONEVISION
from families.native import Conversation
from families.qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL

ZOO: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, QWEN2_VL, QWEN2_5_VL, QWEN3_VL, INTERNVL, IDEFICS3, SMOLVLM, GEMMA3),
    )
}


def family_folder(name: str, folder: Path) -> Path:
    return write_family(ZOO[name], folder)


def noise(size: tuple[int, int], seed: int = 0) -> PIL.Image.Image:
    """A picture of which no two parts look alike."""
    width, height = size
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def conversation(name: str, medium: str | None = None, answer: str = "a red square", seed: int = 0) -> Conversation:
    """A question about one `medium`, by default the family's first, and its answer, as `apply_chat_template` takes it.
    Equal seeds, equal media.
    """
    medium = medium or ZOO[name].media[0]
    content = {"image": {"type": "image", "image": noise((80, 48), seed)}}[medium]
    return [
        {"role": "user", "content": [content, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
