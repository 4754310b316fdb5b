"""A row of sample numbers -> the tensors of one training step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.model.tokenize import IGNORED


class Collator:
    """Packed samples stand one after the other in one row, positions restarting (1, T). For LLMs that can't be packed
    (`packed=False`) each sample is a row, padded on the right (B, T).

    `media(kind, key)` gives a medium's features (S, L, W), or its prepared tensor where nothing is cached; `field` says
    which. Samples with a teacher's tokens are laid out a second time, as `teacher`.

    `heads`, {name: outputs}, where heads with weights answer some samples, or losses are weighed: then a batch also has
    `loss_weights` of its learnt tokens, `items`, how many tokens and samples are learnt from, and `heads` {name: {rows,
    the last of a question in B*T; targets, groups, weights}}.
    """

    def __init__(
        self,
        samples: Any,
        media: Callable[[str, str], Tensor],
        *,
        field: str,
        packed: bool = True,
        pad_token_id: int = 0,
        heads: Mapping[str, int] | None = None,
    ) -> None:
        self.samples = samples
        self.media = media
        self.field = field
        self.packed = packed
        self.pad_token_id = pad_token_id
        self.heads = heads

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        chosen = [self.samples[number] for row in rows for number in row["samples"]]
        batch = self._lay_out([(sample["input_ids"], sample["labels"]) for sample in chosen])
        media: dict[str, list[Tensor]] = {}
        for sample in chosen:
            for kind, key in zip(sample["media_kinds"], sample["media_keys"], strict=True):
                media.setdefault(kind, []).append(self.media(kind, key))
        batch[self.field] = media
        if self.heads is not None:
            self._add_heads(batch, chosen, self.heads)
        if "teacher_input_ids" in chosen[0]:
            batch["teacher"] = self._lay_out([(s["teacher_input_ids"], s["teacher_labels"]) for s in chosen])
        if any(row.get("filler") for row in rows):
            self._unlearn(batch)
        return batch

    def _unlearn(self, batch: dict[str, Any]) -> None:
        """Nothing is learnt from a row that only keeps a process busy while others have the last ones."""
        batch["labels"].fill_(IGNORED)
        batch["shift_labels"].fill_(IGNORED)
        if "teacher" in batch:
            batch["label_rows"] = batch["label_rows"][:0]
            batch["teacher"]["label_rows"] = batch["teacher"]["label_rows"][:0]
        if "heads" in batch:
            batch["items"] = 0
            batch["loss_weights"].zero_()
            batch["heads"] = {name: {k: v[:0] for k, v in head.items()} for name, head in batch["heads"].items()}

    def _add_heads(self, batch: dict[str, Any], chosen: Sequence[Mapping[str, Any]], heads: Mapping[str, int]) -> None:
        learnt = [sum(label != IGNORED for label in sample["labels"][1:]) for sample in chosen]
        weights = [sample["loss_weight"] for sample, count in zip(chosen, learnt, strict=True) for _ in range(count)]
        if not weights:  # the LLM's own head wants a row to look at, be it that nothing is learnt from it
            batch["label_rows"], batch["shift_labels"] = torch.tensor([0]), torch.tensor([[IGNORED]])
            weights = [0.0]
        lengths = [len(sample["input_ids"]) for sample in chosen]
        width = batch["input_ids"].shape[1]
        ends = [(sum(lengths[: i + 1]) if self.packed else i * width + lengths[i]) - 1 for i in range(len(chosen))]
        groups = {group: number for number, group in enumerate(dict.fromkeys(sample["group"] for sample in chosen))}
        batch["loss_weights"] = torch.tensor([weights])
        batch["heads"] = {}
        for name, outputs in heads.items():
            own = [i for i, sample in enumerate(chosen) if sample["head"] == name]
            batch["heads"][name] = {
                "rows": torch.tensor([ends[i] for i in own], dtype=torch.long),
                "targets": torch.tensor([chosen[i]["target"] for i in own]).view(len(own), outputs),
                "groups": torch.tensor([groups[chosen[i]["group"]] for i in own], dtype=torch.long),
                "weights": torch.tensor([chosen[i]["loss_weight"] for i in own]),
            }
        batch["items"] = sum(learnt) + sum(sample["head"] != "" for sample in chosen)

    def _lay_out(self, samples: Sequence[tuple[list[int], list[int]]]) -> dict[str, Any]:
        # The first token of a sample follows another sample's last: it is no one's continuation.
        samples = [(ids, [IGNORED, *labels[1:]]) for ids, labels in samples]
        batch = self._packed(samples) if self.packed else self._padded(samples)
        # The fused head shifts whole rows: only the hidden states before a learnt token go through it.
        labels = batch["labels"]
        batch["label_rows"] = torch.nonzero(labels[:, 1:].flatten() != IGNORED).flatten()
        if labels.shape[0] > 1:  # numbers of the (B, T - 1) grid -> of (B, T)
            batch["label_rows"] += batch["label_rows"] // (labels.shape[1] - 1)
        batch["shift_labels"] = labels.flatten()[batch["label_rows"] + 1][None]
        return batch

    def _packed(self, samples: Sequence[tuple[list[int], list[int]]]) -> dict[str, Any]:
        return {
            "input_ids": torch.tensor([[token for ids, _ in samples for token in ids]]),
            "labels": torch.tensor([[label for _, labels in samples for label in labels]]),
            "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in samples])[None],
        }

    def _padded(self, samples: Sequence[tuple[list[int], list[int]]]) -> dict[str, Any]:
        longest = max(len(ids) for ids, _ in samples)

        def pad(values: Sequence[int], filler: int) -> list[int]:
            return [*values, *[filler] * (longest - len(values))]

        return {
            "input_ids": torch.tensor([pad(ids, self.pad_token_id) for ids, _ in samples]),
            "labels": torch.tensor([pad(labels, IGNORED) for _, labels in samples]),
            "attention_mask": torch.tensor([pad([1] * len(ids), 0) for ids, _ in samples]),
        }
