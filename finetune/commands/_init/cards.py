"""The LLM and the encoders for a card. Parts and sizes are those of the recipes that come with the package: colab-t4,
gpu-8gb, the recipes for 12 GB, gpu-16gb. Features are computed once and kept, so that an encoder
costs little memory while the LLM trains.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from finetune.commands._init.task import Yaml
from finetune.common.errors import RecipeError, given
from finetune.common.gpu import GIB, computes_bfloat16
from finetune.training.plan.cards import CARDS as GPUS


@dataclass(frozen=True)
class Pretrained:
    """`grid`: patches along a side of a picture."""

    name: str
    revision: str | None
    grid: int = 0


@dataclass(frozen=True)
class InitCard:
    """`memory`: GB; `llm` speaks Chinese and English, `english` only English, in its place where rows are English.
    `tokens`: most per packed row; `learning_rate`: of the LoRA.
    """

    name: str
    title: str
    memory: int
    llm: Pretrained
    vision: Pretrained
    tokens: int
    learning_rate: str
    english: Pretrained | None = None
    dtype: str = ""
    checkpoints: bool = False


QWEN_05B = Pretrained("Qwen/Qwen2.5-0.5B-Instruct", "7ae557604adf67be50417f59c2c2f167def9a775")
QWEN_15B = Pretrained("Qwen/Qwen2.5-1.5B-Instruct", "989aa7980e4cf806f80c7fef2b1adb7bc71aa306")
QWEN_7B = Pretrained("Qwen/Qwen2.5-7B-Instruct", "a09a35458c702b33eeacc393d103063234e8bc28")
SMOLLM = Pretrained("HuggingFaceTB/SmolLM2-1.7B-Instruct", "31b70e2e869a7173562077fd711b654946d38674")
SIGLIP = Pretrained("google/siglip-base-patch16-224", "7fd15f0689c79d79e38b1c2e2e2370a7bf2761ed", 14)
SIGLIP2_384 = Pretrained("google/siglip2-base-patch16-384", "f775b65a79762255128c981547af89addcfe0f88", 24)
SO400M = Pretrained("google/siglip-so400m-patch14-384", "9fdffc58afc957d1a03a25b10dba0329ab15c2a3", 27)
WHISPER = Pretrained("openai/whisper-small", "973afd24965f72e36ca33b3055d56a652f456b4d")

# In 4 bits an LLM of n billion parameters takes about 0.6 n GB; the rest is for activations. Qwen2.5-3B isn't here:
# its licence forbids commercial use.
CARDS = (
    InitCard("cpu", "the CPU", 0, QWEN_05B, SIGLIP, 1024, "4.0e-4"),
    InitCard("8gb", "a GPU of 8 GB", 8, QWEN_15B, SIGLIP, 2048, "2.0e-4", english=SMOLLM, checkpoints=True),
    InitCard("12gb", "a GPU of 12 GB", 12, QWEN_15B, SIGLIP2_384, 2048, "2.0e-4", checkpoints=True),
    InitCard("t4", "a T4 (16 GB)", 16, QWEN_15B, SIGLIP, 2048, "2.0e-4", dtype="float16"),
    InitCard("16gb", "a GPU of 16 GB", 16, QWEN_7B, SO400M, 2048, "1.0e-4", checkpoints=True),
    InitCard("24gb", "a GPU of 24 GB", 24, QWEN_7B, SO400M, 4096, "1.0e-4", checkpoints=True),
)
NAMES = tuple(card.name for card in CARDS)
MOST_MEMORY = 200  # GB of a GPU: a larger number is the name of one
RESERVED = 0.7  # GB that programs don't get
VIDEO_FRAMES, VIDEO_POOL = 8, 4
SOUND_ROWS, SOUND_FACTOR = 50, 8  # Whisper's rows per second, and how many become one token
SHRINKS = 32  # a convolution's grid has 1/32 of the picture's side
KINDS = {  # the encoder for the model_type of a local folder
    **dict.fromkeys(("wav2vec2", "hubert", "wavlm", "data2vec-audio"), "wave"),
    **dict.fromkeys(("audio-spectrogram-transformer", "clap"), "spectrogram"),
    **dict.fromkeys(("videomae", "vjepa2"), "video_transformer"),
}


SOUND = ("whisper", *(kind for kind, part in KINDS.items() if part != "video_transformer"))
VIDEOS = tuple(kind for kind, part in KINDS.items() if part == "video_transformer")


@dataclass(frozen=True)
class MediumParts:
    """An encoder and a projector as a recipe has them. `tokens`: of one medium, or of a second of sound."""

    encoder: Yaml
    projector: Yaml
    tokens: float


def card_of(name: str) -> InitCard:
    """By its name, by that of a GPU that `plan` knows ('rtx3060-12gb', '3060'), or the largest with no more than so
    many GB: 10, '10gb'. Raises RecipeError.
    """
    text = re.sub(r"[\s_-]", "", name.lower())
    for card in CARDS:
        if text == card.name:
            return card
    number = re.fullmatch(r"(\d+(?:\.\d+)?)(?:gi?b)?", text)
    if number and float(number[1]) <= MOST_MEMORY:
        return _of_memory(float(number[1]))
    known = [
        gpu.memory * GIB / 1e9 for gpu in GPUS.values() if re.search(r"\d", text) and text in gpu.name.replace("-", "")
    ]
    if known:
        return _of_memory(min(known) + RESERVED)
    raise RecipeError(
        f"{given('card', name)}: write one of {', '.join(NAMES)}, the GPU's memory in GB, or a GPU of {', '.join(GPUS)}"
    )


def _of_memory(gigabytes: float) -> InitCard:
    fit = [card for card in CARDS if card.memory <= gigabytes and not card.dtype]
    return max(fit, key=lambda card: card.memory)


def this_card() -> InitCard:
    """That of this machine's first GPU; the CPU where there is none. Imports torch only where an NVIDIA driver is."""
    if shutil.which("nvidia-smi"):
        import torch

        if torch.cuda.is_available():
            memory = torch.cuda.get_device_properties(0).total_memory / 1e9
            return card_of("t4") if memory > 12 and not computes_bfloat16() else _of_memory(memory + RESERVED)
    return card_of("cpu")


def llm_of(card: InitCard, language: str, name: str | None) -> Yaml:
    """The LLM as a recipe has it; `name`: of another, a Hub id or a folder."""
    usual = card.english if card.english and language == "en" else card.llm
    chosen = Pretrained(name, None) if name else usual
    revision: Yaml = {"revision": chosen.revision} if chosen.revision else {}
    dtype: Yaml = {"dtype": card.dtype} if card.dtype else {}
    return {"name": chosen.name, **revision, "quantize": "nf4", **dtype}


def parts_of(medium: str, card: InitCard, name: str | None, folder: Path | None) -> MediumParts:
    """The encoder and projector of a medium. `name`: of another encoder, which is in `folder` if it is local. Raises
    RecipeError.
    """
    config = _config(folder) if folder else {}
    usual = WHISPER if medium == "audio" else SIGLIP if medium == "video" else card.vision
    chosen = Pretrained(name, None, _grid(config)) if name else usual
    encoder: Yaml = {"kind": "vision", "name": chosen.name}
    if chosen.revision:
        encoder["revision"] = chosen.revision
    model_type = str(config.get("model_type", ""))
    local_kind = KINDS.get(model_type)
    reads = ("audio",) if model_type in SOUND else ("video",) if model_type in VIDEOS else ("image", "video")
    if model_type and medium not in reads:
        raise RecipeError(
            f"{given('encoder', name)}: is a {model_type}, which isn't known as an encoder of {medium}; name another, "
            f"or write model.encoders.{medium} yourself"
        )
    if medium == "audio":
        factor = SOUND_FACTOR
        encoder["kind"] = local_kind or "whisper"
        return MediumParts(encoder, {"kind": "stack", "factor": factor}, SOUND_ROWS / factor)
    if not name:
        encoder["layer"] = -2  # the last but one generalises better (LLaVA, https://arxiv.org/abs/2304.08485)
    if medium == "video":
        frames: Yaml = {} if local_kind else {"frames": VIDEO_FRAMES}  # a video transformer knows its own number
        encoder |= {"kind": local_kind or "video", **frames, "pool": VIDEO_POOL}
        return MediumParts(encoder, {"kind": "mlp"}, VIDEO_FRAMES * (VIDEO_POOL**2 + 4))
    for factor in (3, 2):
        if chosen.grid and chosen.grid % factor == 0 and chosen.grid > factor:
            tokens = (chosen.grid // factor) ** 2
            return MediumParts(encoder, {"kind": "pixel_shuffle", "factor": factor}, tokens)
    return MediumParts(encoder, {"kind": "mlp"}, chosen.grid**2 or 256)


def _config(folder: Path) -> Yaml:
    try:
        config: Yaml = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{folder}: no config.json that can be read in it ({error})") from None
    vision = config.get("vision_config")
    return vision if isinstance(vision, dict) else config


def _grid(config: Yaml) -> int:
    """0 where the folder's config doesn't say."""
    side, patch = config.get("image_size"), config.get("patch_size", SHRINKS)
    return side // patch if isinstance(side, int) and isinstance(patch, int) else 0
