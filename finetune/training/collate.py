"""A packed row of samples -> the tensors of one training step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from finetune.data.sample import Medium
from finetune.model.tokenize import IGNORED
from finetune.training.samples import TokenizedSample, TokenizedSamples


class PackedRow(TypedDict):
    """An item of the trainer's dataset: numbers of samples. A `filler` row only keeps a process busy while others have
    the last rows: nothing is learned from it.
    """

    samples: list[int]
    filler: bool


class TokenBatch(TypedDict, total=False):
    """Token ids (B, T) with their labels, -100 where nothing is learned. Packed rows have `position_ids` that restart
    with each sample, padded ones an `attention_mask`. `label_rows` (K,), indices into B*T of the states before a
    learned token, and `shift_labels` (1, K), those tokens: the output head is applied to them only.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    label_rows: Tensor
    shift_labels: Tensor


class HeadBatch(TypedDict):
    """K samples that one head answers: `rows`, indices into B*T of the last state of their questions; `targets`
    (K, outputs); `groups` (K,), equal for samples that are compared; `weights` (K,) of their losses.
    """

    rows: Tensor
    targets: Tensor
    groups: Tensor
    weights: Tensor


class Batch(TokenBatch, total=False):
    """One training step. `features` {medium: each (S, L, W)}, or `media`, prepared for their encoder; `teacher`, where
    a stage distills. Where losses are weighted: `loss_weights` (1, K), `items`, the number of learned tokens and of
    samples that heads answer, and `heads` {name: HeadBatch}.
    """

    features: dict[str, list[Tensor]]
    media: dict[str, list[Tensor]]
    teacher: TokenBatch
    loss_weights: Tensor
    items: int
    heads: dict[str, HeadBatch]


class LabelledTokens(NamedTuple):
    input_ids: Sequence[int]
    labels: Sequence[int]


class Collator:
    """Packed samples come one after the other in one row, positions restarting (1, T). For LLMs that can't be packed
    (`packed=False`) each sample is a row, padded on the right (B, T).

    `read(medium)` gives a medium's features (S, L, W), or its prepared tensor where nothing is cached; `field` says
    which. `heads`, {name: outputs}, where losses are weighted: see `Batch`.
    """

    def __init__(
        self,
        samples: TokenizedSamples,
        read: Callable[[Medium], Tensor],
        *,
        field: Literal["features", "media"],
        packed: bool = True,
        pad_token_id: int = 0,
        heads: Mapping[str, int] | None = None,
    ) -> None:
        self.samples = samples
        self.read = read
        self.field = field
        self.packed = packed
        self.pad_token_id = pad_token_id
        self.heads = heads

    def __call__(self, rows: Sequence[PackedRow]) -> Batch:
        chosen = [self.samples[number] for row in rows for number in row["samples"]]
        batch = Batch(**self._lay_out([LabelledTokens(sample.input_ids, sample.labels) for sample in chosen]))
        media: dict[str, list[Tensor]] = {}
        for medium in (medium for sample in chosen for medium in sample.media):
            media.setdefault(medium.kind, []).append(self.read(medium))
        batch[self.field] = media
        if self.heads is not None:
            self._add_heads(batch, chosen, self.heads)
        teacher = [LabelledTokens(s.teacher_input_ids, s.teacher_labels or ()) for s in chosen if s.teacher_input_ids]
        if teacher:
            batch["teacher"] = self._lay_out(teacher)
        if any(row.get("filler") for row in rows):
            _ignore(batch)
        return batch

    def _add_heads(self, batch: Batch, chosen: Sequence[TokenizedSample], heads: Mapping[str, int]) -> None:
        learned = [sum(label != IGNORED for label in sample.labels[1:]) for sample in chosen]
        weights = [sample.loss_weight for sample, count in zip(chosen, learned, strict=True) for _ in range(count)]
        if not weights:  # the LLM's own head needs a row, even if nothing is learned from it
            batch["label_rows"], batch["shift_labels"] = torch.tensor([0]), torch.tensor([[IGNORED]])
            weights = [0.0]
        lengths = [len(sample.input_ids) for sample in chosen]
        width = batch["input_ids"].shape[1]
        ends = [(sum(lengths[: i + 1]) if self.packed else i * width + lengths[i]) - 1 for i in range(len(chosen))]
        groups = {group: number for number, group in enumerate(dict.fromkeys(sample.group for sample in chosen))}
        batch["loss_weights"] = torch.tensor([weights])
        batch["heads"] = {}
        for name, outputs in heads.items():
            numbers = [i for i, sample in enumerate(chosen) if sample.head == name]
            batch["heads"][name] = HeadBatch(
                rows=torch.tensor([ends[i] for i in numbers], dtype=torch.long),
                targets=torch.tensor([chosen[i].target for i in numbers]).view(len(numbers), outputs),
                groups=torch.tensor([groups[chosen[i].group] for i in numbers], dtype=torch.long),
                weights=torch.tensor([chosen[i].loss_weight for i in numbers]),
            )
        batch["items"] = sum(learned) + sum(sample.head != "" for sample in chosen)

    def _lay_out(self, samples: Sequence[LabelledTokens]) -> TokenBatch:
        # The first token of a sample follows another sample's last: nothing predicts it.
        samples = [LabelledTokens(ids, [IGNORED, *labels[1:]]) for ids, labels in samples]
        layout = _packed(samples) if self.packed else _padded(samples, self.pad_token_id)
        labels = layout["labels"]
        rows = torch.nonzero(labels[:, 1:].flatten() != IGNORED).flatten()
        if labels.shape[0] > 1:  # numbers of the (B, T - 1) grid -> of (B, T)
            rows += rows // (labels.shape[1] - 1)
        layout["label_rows"] = rows
        layout["shift_labels"] = labels.flatten()[rows + 1][None]
        return layout


def _packed(samples: Sequence[LabelledTokens]) -> TokenBatch:
    return TokenBatch(
        input_ids=torch.tensor([[token for ids, _ in samples for token in ids]]),
        labels=torch.tensor([[label for _, labels in samples for label in labels]]),
        position_ids=torch.cat([torch.arange(len(ids)) for ids, _ in samples])[None],
    )


def _padded(samples: Sequence[LabelledTokens], pad_token_id: int) -> TokenBatch:
    longest = max(len(ids) for ids, _ in samples)

    def pad(values: Sequence[int], filler: int) -> list[int]:
        return [*values, *[filler] * (longest - len(values))]

    return TokenBatch(
        input_ids=torch.tensor([pad(ids, pad_token_id) for ids, _ in samples]),
        labels=torch.tensor([pad(labels, IGNORED) for _, labels in samples]),
        attention_mask=torch.tensor([pad([1] * len(ids), 0) for ids, _ in samples]),
    )


def _ignore(batch: Batch) -> None:
    """Learn nothing from a batch."""
    batch["labels"].fill_(IGNORED)
    batch["shift_labels"].fill_(IGNORED)
    if "teacher" in batch:
        batch["label_rows"] = batch["label_rows"][:0]
        batch["teacher"]["label_rows"] = batch["teacher"]["label_rows"][:0]
    if "heads" in batch:
        batch["items"] = 0
        batch["loss_weights"].zero_()
        for head in batch["heads"].values():
            head["rows"], head["targets"] = head["rows"][:0], head["targets"][:0]
            head["groups"], head["weights"] = head["groups"][:0], head["weights"][:0]
