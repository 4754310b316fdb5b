"""Small random LLMs with projectors and LoRA, on the device, and what they learn from a row."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu.setting import Setting
from benchmarks.train_vs_trl.workload import ROOT
from finetune.model.adapter import attach
from finetune.model.compose import compose
from finetune.model.composite import MultimodalModel
from finetune.model.row_layout import RowKind
from finetune.model.row_plan import by_segments
from finetune.model.trainable import set_trainable
from finetune.recipe.schema import Adapter
from finetune.training.collate import Batch, Collator
from finetune.training.samples import TokenizedSample

sys.path.insert(0, str(ROOT / "tests/helpers"))
from packed import collator_of, shake, tokenized_sample
from tiny import PLACEHOLDER, fresh_tokenizer, part, tiny_encoder

ROWS = 16  # placeholders of a picture
INPUTS = ("input_ids", "features", "position_ids", "row_plan", "attention_mask", "label_rows")


def llm_folder(setting: Setting, name: str, family: str = "llama", **changes: Any) -> Path:
    """A folder of an LLM in float32, and its tokenizer. Weights are so large that all of attention weighs in."""
    folder = setting.folder / name
    if folder.is_dir():
        return folder
    tokenizer = fresh_tokenizer()
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"max_position_embeddings": 4096, "vocab_size": 416, **special, **setting.small_llm, **changes}
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6 * (32 / sizes["hidden_size"]) ** 0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def composite(llm: Any) -> MultimodalModel:
    """Around a loaded LLM: a projector and a LoRA whose B isn't zero, the same ones for LLMs of the same shape."""
    torch.manual_seed(0)
    model = compose(
        llm,
        encoders={"image": tiny_encoder()},
        projectors={"image": part("projectors", "mlp")},
        fusion=part("fusion", "prefix"),
        placeholder_ids={"image": PLACEHOLDER},
        with_encoders=False,
    )
    attach(model, Adapter(rank=4, alpha=6.8))
    shake(model)
    set_trainable(model, ["projectors", "adapter"])
    return model.eval()


@cache
def questions(setting: Setting) -> tuple[list[TokenizedSample], list[list[int]]]:
    """Samples of uneven lengths, and which of them are about the same picture. One has no question of its own: it is
    learned from the last state of what it shares.
    """
    longest, counts = (12, (3, 1, 2)) if setting.toy else (150, (3, 1, 5, 2))
    generator = torch.Generator().manual_seed(3)
    samples, groups = [], []
    for picture, count in enumerate(counts):
        groups.append(list(range(len(samples), len(samples) + count)))
        for number in range(count):
            asked = 0 if (picture, number) == (0, 1) else 1 + (7 * len(samples)) % longest
            length = 1 + (5 * len(samples)) % (longest // 2)
            words = torch.randint(3, 120, (asked + length,), generator=generator).tolist()
            ids = [3, 4, 5, *[PLACEHOLDER] * ROWS, *words]
            labels = [-100] * (len(ids) - length) + words[asked:]
            samples.append(tokenized_sample(ids, labels, f"image {picture}"))
    return samples, groups


@cache
def collator(setting: Setting, kind: RowKind) -> Collator:
    return collator_of(questions(setting)[0], kind=kind)


def batch(setting: Setting, groups: list[list[int]], kind: RowKind) -> Batch:
    """One row of these groups of the questions, or a padded row each, on the device."""
    found = collator(setting, kind)([{"groups": groups, "filler": False}])
    moved: dict[str, Any] = {
        key: value.to(setting.device) if isinstance(value, Tensor) else value for key, value in found.items()
    }
    moved["features"] = {name: [x.to(setting.device) for x in media] for name, media in found["features"].items()}
    return moved  # type: ignore[return-value]


@dataclass(frozen=True)
class Learned:
    """Losses of all learned tokens, in the order of the rows, and gradients of what trains."""

    losses: Tensor
    gradients: dict[str, Tensor]

    def errors(self, expected: "Learned") -> tuple[float, float]:
        """Relative errors of the losses, and of the gradients taken together."""
        assert self.gradients.keys() == expected.gradients.keys()
        assert all(float(gradient.abs().max()) > 0 for gradient in expected.gradients.values()), "a gradient is zero"
        found = torch.cat([self.gradients[name].double().flatten() for name in expected.gradients])
        wanted = torch.cat([gradient.double().flatten() for gradient in expected.gradients.values()])
        return relative(self.losses, expected.losses), relative(found, wanted)


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of what differs, by that of what is expected; infinite where something isn't finite."""
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    return float(error) if torch.isfinite(error) else float("inf")


def learn(model: MultimodalModel, batches: Sequence[Batch], dtype: torch.dtype) -> Learned:
    """What is learned from several rows together, in autocast but for float32. Each token weighs otherwise."""
    model.zero_grad()
    count = sum(one["shift_labels"].numel() for one in batches)
    weights = torch.linspace(0.3, 1.9, count, device=batches[0]["input_ids"].device)
    losses: list[Tensor] = []
    for one in batches:
        planned = "row_plan" in one
        with by_segments(model.causal_lm) if planned else nullcontext():
            with torch.autocast(weights.device.type, dtype, enabled=dtype != torch.float32):
                states = model.backbone(**{key: one[key] for key in INPUTS if key in one}, use_cache=False)
                logits = model.get_output_embeddings()(states.last_hidden_state[0])
            found = cross_entropy(logits.float(), one["shift_labels"][0], reduction="none")
            begin = sum(map(len, losses))
            (found * weights[begin : begin + len(found)]).sum().backward()
        losses.append(found.detach())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return Learned(torch.cat(losses), gradients)


def apart(model: MultimodalModel, setting: Setting, dtype: torch.dtype) -> Learned:
    """From each sample in a row of its own, by the LLM's own attention."""
    numbers = [number for group in questions(setting)[1] for number in group]
    return learn(model, [batch(setting, [[number]], RowKind.PADDED) for number in numbers], dtype)


def in_one_row(model: MultimodalModel, setting: Setting, dtype: torch.dtype, kind: RowKind) -> Learned:
    return learn(model, [batch(setting, questions(setting)[1], kind)], dtype)
