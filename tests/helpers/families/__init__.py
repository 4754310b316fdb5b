"""Small random models of published multimodal families, with the files that their folders have on the Hub."""

from pathlib import Path

import numpy as np
import PIL.Image
from tiny_encoders import tiny_sound

from families.audio import AUDIO_FLAMINGO3, GRANITE_SPEECH, QWEN2_5_OMNI, QWEN2_AUDIO, ULTRAVOX
from families.family import Family, write_family
from families.gemma import GEMMA3, PALIGEMMA
from families.idefics import IDEFICS3, SMOLVLM
from families.internvl import INTERNVL
from families.llava import LLAVA, LLAVA_NEXT, LLAVA_ONEVISION
from families.mistral import MISTRAL3, PIXTRAL, VOXTRAL
from families.native import Conversation
from families.others import MINICPM_V, PHI4_MULTIMODAL
from families.qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL

ZOO: dict[str, Family] = {
    "llava": LLAVA,
    "llava_next": LLAVA_NEXT,
    "llava_onevision": LLAVA_ONEVISION,
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": QWEN2_5_VL,
    "qwen3_vl": QWEN3_VL,
    "internvl": INTERNVL,
    "idefics3": IDEFICS3,
    "smolvlm": SMOLVLM,
    "gemma3": GEMMA3,
    "paligemma": PALIGEMMA,
    "pixtral": PIXTRAL,
    "mistral3": MISTRAL3,
    "phi4_multimodal": PHI4_MULTIMODAL,
    "minicpm_v": MINICPM_V,
    "qwen2_audio": QWEN2_AUDIO,
    "voxtral": VOXTRAL,
    "ultravox": ULTRAVOX,
    "audioflamingo3": AUDIO_FLAMINGO3,
    "granite_speech": GRANITE_SPEECH,
    "qwen2_5_omni": QWEN2_5_OMNI,
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
    shown = noise((80, 48), seed) if medium == "image" else tiny_sound(seed=seed)
    content = {"type": medium, medium: shown}
    return [
        {"role": "user", "content": [content, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
