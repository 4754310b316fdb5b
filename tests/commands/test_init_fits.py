"""A recipe that `finetune init` writes for a card fits it, by `plan`, over models of the real ones' sizes."""

import csv
from pathlib import Path

import pytest
from tiny import fresh_tokenizer, tiny_picture
from transformers import AutoConfig, SiglipImageProcessor

import finetune
from finetune.commands._init import cards
from finetune.recipe.load import load_recipe
from finetune.training.plan.cards import USABLE
from finetune.training.plan.plan import plan
from finetune.training.steps import LARGEST_BATCH

pytestmark = pytest.mark.slow

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# As in the config.json of each: its family, SIZES, others.
MODELS = {
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": ("llama", (2048, 8192, 24, 32), {"vocab_size": 49152, "tied": True}),
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", (1536, 8960, 28, 12), {"kv": 2, "vocab_size": 151936, "tied": True}),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", (3584, 18944, 28, 28), {"kv": 4, "vocab_size": 152064, "tied": False}),
    "google/siglip-base-patch16-224": ("siglip_vision_model", (768, 3072, 12, 12), {"side": 224, "patch_size": 16}),
    "google/siglip2-base-patch16-384": ("siglip_vision_model", (768, 3072, 12, 12), {"side": 384, "patch_size": 16}),
    "google/siglip-so400m-patch14-384": (
        "siglip_vision_model",
        (1152, 4304, 27, 16),
        {"side": 384, "patch_size": 14},
    ),
}
NAMES = {"kv": "num_key_value_heads", "tied": "tie_word_embeddings", "side": "image_size"}


def write_config(name: str, folder: str) -> dict[str, int]:
    family, sizes, others = MODELS[name]
    values = dict(zip(SIZES, sizes, strict=True)) | {NAMES.get(key, key): value for key, value in others.items()}
    AutoConfig.for_model(family, **values).save_pretrained(folder)
    return values


# The T4 has the LLM of the 8 GB card, 24 GB that of 16 GB; 12 GB keep as few activations as 8.
@pytest.mark.parametrize("name", ["8gb", "16gb"])
def test_the_recipe_for_a_card_fits_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = cards.card_of(name)
    write_config((card.english or card.llm).name, "llm")
    fresh_tokenizer().save_pretrained("llm")
    side = write_config(card.vision.name, "encoder")["image_size"]
    SiglipImageProcessor(size={"height": side, "width": side}).save_pretrained("encoder")
    Path("shop").mkdir()
    for number in range(60):
        tiny_picture((4 * number, 10, 250 - 4 * number)).save(f"shop/{number}.png")
    with open("shop/rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "label"], *([f"{n}.png", "abc"[n % 3]] for n in range(60))])
    recipe = load_recipe(finetune.init("shop", card=name, llm="llm", encoders=["image=encoder"]))
    planned = plan(recipe.with_(f"train.tokens_per_batch={LARGEST_BATCH}"), "t4", advise=False)
    assert planned.needed < card.memory * USABLE * 2**30, f"{planned.fullest.name}: {planned.needed / 2**30:.1f} GiB"
