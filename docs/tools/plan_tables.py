"""Write the listing and the tables of docs/plan.md and docs/plan.zh.md: `python docs/tools/plan_tables.py`.

Nothing is downloaded: the models of the recipes for GPUs are planned from their sizes, which stand here as their
config.json on the Hub has them. Text is tokenized by the quickstart's tokenizer, so `make quickstart` first.
"""

import contextlib
import io
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ |= {"COLUMNS": "100", "HF_HUB_OFFLINE": "1"}

import finetune  # noqa: E402
from finetune.common.gpu import GIB  # noqa: E402
from finetune.training.plan.cards import CARDS, SIZES, USABLE, Card  # noqa: E402
from finetune.training.plan.result import Plan, duration  # noqa: E402

PAGES = {"en": ROOT / "docs" / "plan.md", "zh": ROOT / "docs" / "plan.zh.md"}
HEADERS = {
    "recipes": {
        "en": ("recipe", "LLM in nf4", "encoder", "memory", "card, settings", "on a T4", "on an RTX 4090"),
        "zh": ("配方", "语言模型（nf4）", "编码器", "显存", "显卡与所需设置", "T4 上", "RTX 4090 上"),
    },
    "cards": {
        "en": ("card", "GiB", "TFLOPS", "GB/s", "US$/h", "source of speed", "source of rent"),
        "zh": ("显卡", "GiB", "TFLOPS", "GB/s", "美元/小时", "速度的来源", "租金的来源"),
    },
}
RENTED = ("t4", "rtx4090")
LISTED = ROOT / "recipes" / "quickstart.yaml"
TOKENIZER = ROOT / "weights" / "minimind2-small"


@dataclass(frozen=True)
class Sizes:
    """Of a model, by keys of its config."""

    family: str
    config: dict[str, Any]


def _vision(width: int, layers: int, inner: int, heads: int, patch: int, side: int) -> Sizes:
    config = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": inner}
    return Sizes(
        "siglip_vision_model", config | {"num_attention_heads": heads, "patch_size": patch, "image_size": side}
    )


def _llm(family: str, width: int, layers: int, inner: int, heads: tuple[int, int], words: int, **more: Any) -> Sizes:
    config = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": inner, "vocab_size": words}
    return Sizes(family, config | {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], **more})


MODELS = {
    "Qwen/Qwen2.5-0.5B-Instruct": _llm("qwen2", 896, 24, 4864, (14, 2), 151_936, tie_word_embeddings=True),
    "Qwen/Qwen2.5-1.5B-Instruct": _llm("qwen2", 1536, 28, 8960, (12, 2), 151_936, tie_word_embeddings=True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _llm("llama", 2048, 24, 8192, (32, 32), 49_152, tie_word_embeddings=True),
    "Qwen/Qwen2.5-7B-Instruct": _llm("qwen2", 3584, 28, 18_944, (28, 4), 152_064, tie_word_embeddings=False),
    "google/siglip-base-patch16-224": _vision(768, 12, 3072, 12, 16, 224),
    "google/siglip2-base-patch16-224": _vision(768, 12, 3072, 12, 16, 224),
    "google/siglip2-base-patch16-384": _vision(768, 12, 3072, 12, 16, 384),
    "google/siglip-so400m-patch14-384": _vision(1152, 27, 4304, 16, 14, 384),
    "openai/whisper-small": Sizes("whisper", {"d_model": 768, "encoder_layers": 12, "encoder_attention_heads": 12}),
}
RECIPES = ("transcribe-speech", "gpu-8gb", "colab-t4")


def folder_of(name: str, into: Path) -> Path:
    """A folder with the config of a model of these sizes and no weights."""
    import transformers

    folder, sizes = into / name.replace("/", "--"), MODELS[name]
    if folder.exists():
        return folder
    transformers.AutoConfig.for_model(sizes.family, **sizes.config).save_pretrained(folder)
    if sizes.family == "siglip_vision_model":
        side = sizes.config["image_size"]
        transformers.SiglipImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    elif sizes.family == "whisper":
        transformers.WhisperFeatureExtractor().save_pretrained(folder)
    else:
        transformers.AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def planned(recipe: str, gpu: str, into: Path) -> Plan:
    path = ROOT / "recipes" / f"{recipe}.yaml"
    model = finetune.load_recipe(path).model
    parts = {"model.llm": model.llm.name}
    parts |= {f"model.encoders.{medium}": part.options.name for medium, part in model.encoders.items()}
    changes = [f"{key}.name={folder_of(name, into)}" for key, name in parts.items()]
    return finetune.plan(path, [*changes, *(f"{key}.revision=null" for key in parts)], gpu)


def row(recipe: str, into: Path, none: str = "none") -> tuple[str, ...]:
    """Of the table of recipes: on each size of a card the settings that it needs, from the smallest that fits on."""
    model = finetune.load_recipe(ROOT / "recipes" / f"{recipe}.yaml").model
    first, second = (planned(recipe, gpu, into) for gpu in RENTED)
    encoders = [part.options.name.split("/")[-1] for part in model.encoders.values()]
    fits: dict[str, int] = {}
    for size in SIZES:
        if (change := first.fit(size * USABLE)) is not None:
            fits.setdefault(f"`{change}`" if change.keys else "", size)
    where = "; ".join(f"{size} GB{': ' if keys else ''}{keys}" for keys, size in fits.items())
    memory = f"{first.needed / GIB:.1f} GiB"
    times = (f"{duration(sum(one.seconds.values()))}, {one.dollars:.2f} US$" for one in (first, second))
    return (f"`{recipe}`", model.llm.name.split("/")[-1], ", ".join(encoders), memory, where or none, *times)


def card_row(card: Card) -> tuple[str, ...]:
    figures = (f"{card.memory:g}", f"{card.tflops:g}", f"{card.bandwidth:g}", f"{card.rent:.2f}")
    return (f"`{card.name}`", *figures, *card.sources)


def table(name: str, language: str, rows: list[tuple[str, ...]]) -> str:
    header = HEADERS[name][language]
    numbers = name == "cards"
    rule = ["---:" if numbers and 1 <= column <= 4 else "---" for column in range(len(header))]
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def listing() -> str:
    """What `finetune plan recipes/quickstart.yaml --gpu t4` prints."""
    from finetune.commands.tables import print_plan

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        print_plan(finetune.plan(LISTED, gpu="t4"))
    return "```\n" + "\n".join(line.rstrip() for line in text.getvalue().strip("\n").splitlines()) + "\n```"


def cards(language: str) -> str:
    return table("cards", language, [card_row(card) for card in CARDS.values()])


def between(text: str, name: str) -> re.Match[str]:
    """What stands between the markers of this name. Raises ValueError."""
    found = re.search(rf"(?<=<!-- {name} -->\n).*?(?=\n<!-- /{name} -->)", text, re.DOTALL)
    if found is None:
        raise ValueError(f"no markers <!-- {name} --> and <!-- /{name} -->")
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(recipe, Path(folder)) for recipe in RECIPES]
    listed = listing()
    for language, page in PAGES.items():
        text = page.read_text(encoding="utf-8")
        parts = {"listing": listed, "recipes": table("recipes", language, rows), "cards": cards(language)}
        for name, part in parts.items():
            found = between(text, name)
            text = text[: found.start()] + part + text[found.end() :]
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
