"""A row of sample numbers -> the tensors of one training step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.data.tokenize import IGNORED


class Collator:
    """Packed samples stand one after the other in one row, positions restarting (1, T). For LLMs that can't be packed
    (`packed=False`) each sample is a row, padded on the right (B, T).

    `media(kind, key)` gives a medium's features (S, L, W), or its prepared tensor where nothing is cached; `field` says
    which. Samples with a teacher's tokens are laid out a second time, as `teacher`.
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
        batch = self._lay_out([(sample["input_ids"], sample["labels"]) for sample in chosen])
        media: dict[str, list[Tensor]] = {}
        for sample in chosen:
            for kind, key in zip(sample["media_kinds"], sample["media_keys"], strict=True):
                media.setdefault(kind, []).append(self.media(kind, key))
        batch[self.field] = media
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
