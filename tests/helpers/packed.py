"""Samples with a picture, batches of them, and a composite trained on them by one stage's trainer."""

from pathlib import Path
from typing import Any

import torch
from tiny import PLACEHOLDER, VOCABULARY, tiny_composite, tiny_tokenizer

from finetune.model.adapter import attach
from finetune.model.composite import MultimodalModel
from finetune.model.trainable import set_trainable, trained_parts
from finetune.training.collate import Collator
from finetune.training.trainer import train_stage

PICTURE = {"prefix": 4, "cross_attention": 1}  # placeholder tokens of one, by fusion


def samples_of(lengths: list[int], placeholders: int = 4) -> list[dict]:
    """One picture, a question of three tokens, an answer that is learnt."""
    generator = torch.Generator().manual_seed(5)
    samples = []
    for number, length in enumerate(lengths):
        text = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        ids = text[:1] + [PLACEHOLDER] * placeholders + text[1:]
        labels = [-100] * (placeholders + 3) + ids[placeholders + 3 :]
        samples.append({"input_ids": ids, "labels": labels, "media_kinds": ["image"], "media_keys": [str(number)]})
    return samples


def features_of(kind: str, key: str) -> torch.Tensor:
    return torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(int(key)))


def batch_of(samples: list[dict], numbers: list[int], packed: bool) -> dict:
    return Collator(samples, features_of, field="features", packed=packed)([{"samples": numbers}])


def shake(model: MultimodalModel) -> None:
    """LoRA's B begins at zero: something to lose is put there."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


ROWS = [[0, 1], [2], [3, 4], [5, 0], [1, 2], [3, 5]]  # numbers of SAMPLES
SAMPLES = samples_of([9, 6, 12, 7, 8, 10])


def composite_with_lora() -> MultimodalModel:
    torch.manual_seed(0)
    model = tiny_composite()
    attach(model, rank=2, alpha=4, dropout=0.1)
    return model


def train_composite(
    model: MultimodalModel,
    folder: Path,
    *,
    trains: Any = ("projectors", "adapter"),
    rows: list[list[int]] = ROWS,
    collator: Collator | None = None,
    callbacks: Any = (),
    resume_from: Path | None = None,
    **changes: Any,
) -> list[dict]:
    """The log of one stage of training; without a collator over SAMPLES."""
    options = {
        "learning_rate": 1e-2,
        "learning_rates": {},
        "distill_temperature": None,
        "scheduler": "cosine",
        "warmup": 0.1,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "optimizer": "adamw_torch",
        "accumulate": 1,
        "save_every_n_steps": 2,
        "workers": 0,
        "seed": 11,
        "dtype": torch.float32,
    }
    set_trainable(model, list(trains))
    return train_stage(
        model,
        tiny_tokenizer(),
        rows=rows,
        collator=collator or Collator(SAMPLES, features_of, field="features"),
        parts=trained_parts(model, list(trains)),
        folder=folder,
        resume_from=resume_from,
        callbacks=callbacks,
        **(options | changes),
    )


def weights_of(model: MultimodalModel) -> dict[str, torch.Tensor]:
    """A copy of what trains."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
