"""A row of sample numbers -> the tensors of one training step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.data.tokenize import IGNORED


class Collator:
    """Packed samples stand one after the other in one row, positions restarting (1, T). For LLMs that can't be packed
    (`packed=False`) each sample is a row, padded on the right (B, T).

    `media(key)` gives a medium's features (L, W), or its prepared tensor where nothing is cached; `field` says which.
    """

    def __init__(
        self,
        samples: Any,
        media: Callable[[str, str], Tensor],
        *,
        field: str,
        packed: bool = True,
        pad_token_id: int = 0,
    ) -> None:
        self.samples = samples
        self.media = media
        self.field = field
        self.packed = packed
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        chosen = [self.samples[number] for row in rows for number in row["samples"]]
        batch = self._packed(chosen) if self.packed else self._padded(chosen)
        media: dict[str, list[Tensor]] = {}
        for sample in chosen:
            for kind, key in zip(sample["media_kinds"], sample["media_keys"], strict=True):
                media.setdefault(kind, []).append(self.media(kind, key))
        batch[self.field] = media
        # The fused head shifts whole rows: only the hidden states before a learnt token go through it.
        labels = batch["labels"]
        batch["label_rows"] = torch.nonzero(labels[:, 1:].flatten() != IGNORED).flatten()
        if labels.shape[0] > 1:  # numbers of the (B, T - 1) grid -> of (B, T)
            batch["label_rows"] += batch["label_rows"] // (labels.shape[1] - 1)
        batch["shift_labels"] = labels.flatten()[batch["label_rows"] + 1][None]
        return batch

    def _packed(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        # The first token of a sample follows another sample's last: it is no one's continuation.
        labels = [[IGNORED, *sample["labels"][1:]] for sample in samples]
        return {
            "input_ids": torch.tensor([[token for sample in samples for token in sample["input_ids"]]]),
            "labels": torch.tensor([[label for sample in labels for label in sample]]),
            "position_ids": torch.cat([torch.arange(len(sample["input_ids"])) for sample in samples])[None],
        }

    def _padded(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(sample["input_ids"]) for sample in samples)

        def pad(values: Sequence[int], filler: int) -> list[int]:
            return [*values, *[filler] * (longest - len(values))]

        return {
            "input_ids": torch.tensor([pad(s["input_ids"], self.pad_token_id) for s in samples]),
            "labels": torch.tensor([pad([IGNORED, *s["labels"][1:]], IGNORED) for s in samples]),
            "attention_mask": torch.tensor([pad([1] * len(s["input_ids"]), 0) for s in samples]),
        }
