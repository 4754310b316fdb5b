"""Samples with a picture, batches of them, and a composite trained on them by one stage's trainer."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import (
    FUSIONS,
    PLACEHOLDER,
    VOCABULARY,
    part,
    tiny_composite,
    tiny_encoder,
    tiny_llm,
    tiny_tokenizer,
)
from transformers import TrainerCallback

from finetune.data.sample import Medium
from finetune.model.adapter import attach
from finetune.model.bindings import TaskBinding
from finetune.model.compose import compose
from finetune.model.composite import MultimodalModel
from finetune.model.row_layout import RowKind
from finetune.model.trainable import set_trainable
from finetune.recipe.schema import Adapter, Stage, Train
from finetune.training.collate import Batch, Collator
from finetune.training.samples import TokenizedSample, TokenizedSamples
from finetune.training.stage_training import StageTraining
from finetune.training.stopping import StopBetweenSteps
from finetune.training.trainer import train_stage

PICTURE = {"prefix": 4, "cross_attention": 1}  # placeholder tokens of one, by fusion


def tokenized_sample(
    input_ids: list[int], labels: list[int], *media: str, spans: Sequence[tuple[int, int]] = (), **fields: Any
) -> TokenizedSample:
    """`media`: 'image a' is a picture whose key and path are 'a'; `spans`: where each begins and ends in `input_ids`,
    by default from the first placeholder to the last.
    """
    kinds, keys = [one.split()[0] for one in media], [one.split()[1] for one in media]
    places = [place for place, token in enumerate(input_ids) if token == PLACEHOLDER] or [0]
    spans = spans or [(places[0], places[-1] + 1)] * len(media)
    begins, ends = [begin for begin, _ in spans], [end for _, end in spans]
    return TokenizedSample(input_ids, labels, "rows.csv:2", kinds, keys, keys, begins, ends, **fields)


def samples_of(lengths: list[int], placeholders: int = 4) -> list[TokenizedSample]:
    """One picture, a question of three tokens, an answer that is learned."""
    generator = torch.Generator().manual_seed(5)
    samples = []
    for number, length in enumerate(lengths):
        text = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        ids = text[:1] + [PLACEHOLDER] * placeholders + text[1:]
        labels = [-100] * (placeholders + 3) + ids[placeholders + 3 :]
        samples.append(tokenized_sample(ids, labels, f"image {number}"))
    return samples


def features_of(kind: str, key: str) -> torch.Tensor:
    return torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(int(key)))


def read(medium: Medium) -> torch.Tensor:
    return features_of(medium.kind, medium.key)


def collator_of(samples: Sequence[TokenizedSample], **options: Any) -> Collator:
    """Its media have the features of `features_of`, unless `options` hold another `read`."""
    defaults = {"read": read, "field": "features", "kind": RowKind.PACKED}
    return Collator(TokenizedSamples.of(samples), **(defaults | options))


def batch_of(samples: Sequence[TokenizedSample], numbers: Sequence[int], packed: bool = True, **options: Any) -> Batch:
    kind = RowKind.PACKED if packed else RowKind.PADDED
    return collator_of(samples, kind=kind, **options)([{"groups": [[number] for number in numbers], "filler": False}])


def shake(model: MultimodalModel) -> None:
    """LoRA's B begins at zero: something to lose is put there."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


ROWS = [[[0], [1]], [[2]], [[3], [4]], [[5], [0]], [[1], [2]], [[3], [5]]]  # numbers of SAMPLES
SAMPLES = samples_of([9, 6, 12, 7, 8, 10])


def composite_with_lora(family: str = "llama", dropout: float = 0.1) -> MultimodalModel:
    torch.manual_seed(0)
    model = tiny_composite(family)
    attach(model, Adapter(rank=2, alpha=4.0, dropout=dropout))
    return model


def composite_without_dropout() -> MultimodalModel:
    """The same without dropout, whose numbers depend on how rows are computed."""
    model = composite_with_lora()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def training_of(
    model: MultimodalModel,
    folder: Path,
    *,
    trains: Any = ("projectors", "adapter"),
    rows: list[list[list[int]]] = ROWS,
    collator: Collator | None = None,
    settings: Mapping[str, Any] | None = None,
    accumulate: int = 1,
    save_every_n_steps: int = 2,
    **changes: Any,
) -> StageTraining:
    """A stage to train; without a collator over SAMPLES. `settings`: other keys of `train`, `changes`: of the stage."""
    options = {"learning_rate": 1e-2, "warmup": 0.1, "weight_decay": 0.01}
    stage = Stage(name="tune", trains=list(trains), **(options | changes))
    set_trainable(model, stage.trains)
    return StageTraining(
        model=model,
        tokenizer=tiny_tokenizer(),
        stage=stage,
        settings=Train(
            accumulate=accumulate, save_every_n_steps=save_every_n_steps, stages=[stage], **(settings or {})
        ),
        collator=collator or collator_of(SAMPLES),
        rows=rows,
        folder=folder,
        seed=11,
        dtype=torch.float32,
    )


def train_composite(
    model: MultimodalModel, folder: Path, *, callbacks: Any = (), resume_from: Path | None = None, **options: Any
) -> list[dict[str, float]]:
    """The log of one stage of training; `options`: those of `training_of`."""
    training = training_of(model, folder, **options)
    with StopBetweenSteps() as stop:
        return train_stage(training, stop, resume_from, callbacks)


def weights_of(model: MultimodalModel) -> dict[str, torch.Tensor]:
    """A copy of what trains."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class At(TrainerCallback):
    """Does something before step `step` (from 1)."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.act()


def power_cut() -> None:
    raise OSError("power cut")


KINDS = {"colour": ("label", ["red", "blue", "green"]), "price": ("score", [1.0, 2.0, 4.0])}


HEAD_OPTIONS = {"score": {"loss": "pairwise"}, "language": {"answers": "labels"}}


def bindings_for_tests(kinds: dict[str, tuple[str, list[Any]]] = KINDS) -> dict[str, TaskBinding]:
    bindings = {}
    for name, (kind, targets) in kinds.items():
        head = part("heads", kind, **HEAD_OPTIONS.get(kind, {}))
        task = part("tasks", "score" if kind == "score" else "classify")
        bindings[name] = TaskBinding(task=task, head=head, settings=head.module.settings(targets, head.options))
    return bindings


def composite_with_heads(family: str = "llama", fusion: str = "prefix"):
    torch.manual_seed(0)
    model = compose(
        tiny_llm(family),
        encoders={"image": tiny_encoder()},
        projectors={"image": part("projectors", "pixel_shuffle")},
        fusion=part("fusion", fusion, **FUSIONS[fusion]),
        placeholder_ids={"image": PLACEHOLDER},
        bindings=bindings_for_tests(),
    )
    return model.eval()


OUTPUTS = {"colour": 3, "price": 1}


def head_scores(model, batch):
    keys = ("input_ids", "features", "position_ids", "row_plan", "attention_mask")
    rows = {name: head["rows"] for name, head in batch["heads"].items()}
    model.backbone(**{key: batch[key] for key in keys if key in batch}, head_rows=rows, use_cache=False)
    return model.head_scores
