"""Two models on the same rows: next-token distributions and answers."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from finetune.data.rows import Entry, Source
from finetune.data.sample import Medium
from finetune.evaluation.scores import answers_to, scored
from finetune.model.asks import Ask, names_of
from finetune.model.assistant import Assistant, Look
from finetune.model.build import Parts, segments_by
from finetune.model.composite import MultimodalModel
from finetune.model.features import Features
from finetune.model.heads import HeadSettings
from finetune.model.language_model import without_adapter
from finetune.model.tokenize import IGNORED, tokenize, tokenize_prompt

POSITIONS = 1024  # next-token distributions kept for comparison, at most
KEPT = 2**26  # logits kept for comparison, at most
LIKELY = 1e-4


class Compared:
    """The held-out rows that models are compared on. `rows` for their next tokens, `rows_scored` for their answers."""

    def __init__(
        self,
        entries: Sequence[Entry],
        scored_entries: Sequence[Entry],
        sources: Sequence[Source],
        asks: Mapping[str, Ask],
        parts: Parts,
        *,
        max_new_tokens: int,
        batch: int,
    ) -> None:
        self.entries, self.scored_entries, self.sources, self.asks = entries, scored_entries, sources, asks
        self.parts, self.max_new_tokens, self.batch = parts, max_new_tokens, batch
        self.names = names_of(entries, sources)

    @property
    def media(self) -> dict[str, int]:
        """{kind: media shown}."""
        kinds = [medium.kind for entry in self.entries for medium in entry.sample.media]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}

    def scores(
        self, composite: MultimodalModel, features: Features, look: Look, bare: bool = False
    ) -> dict[str, dict[str, float | None]]:
        """{task: {metric: value}} of its answers; None for a value that these rows don't have. `bare`: without the
        adapter.
        """
        parts = self.parts
        assistant = Assistant(composite, parts.tokenizer, parts.placeholders, features.encoders, features.limits)
        how: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "batch": self.batch}
        with without_adapter(composite.language_model) if bare else nullcontext():
            answers = answers_to(assistant, self.scored_entries, self.sources, look=look, **how)
        found = scored(self.asks, self.scored_entries, self.sources, answers)
        return {
            name: {metric: round(value, 4) if math.isfinite(value) else None for metric, value in values.items()}
            for name, values in found.items()
        }

    def next_tokens(
        self, composite: MultimodalModel, look: Look, bare: bool = False, together: int = 1
    ) -> Iterator[Tensor]:
        """Of each row, in order, log-probabilities of the next token where the answer stands (positions, vocabulary),
        float32; of a head with weights see `head_logits`. `bare`: without the adapter. `together`: rows at once.
        """
        most = min(POSITIONS, KEPT // composite.config.text_config.vocab_size) // len(self.entries)
        if "position_ids" not in signature(composite.causal_lm.forward).parameters:
            together = 1  # padding would move the positions
        with without_adapter(composite.language_model) if bare else nullcontext():
            for batch in self._batches(composite, look, max(1, most), together):
                yield from _log_probabilities(composite, batch)

    def _batches(self, composite: MultimodalModel, look: Look, most: int, together: int) -> Iterator[dict[str, Any]]:
        """Rows as they are trained, with the positions that predict the answer, `most` a row, counted from the end;
        `together` at once if the same head answers, padded on the left.
        """
        segments = segments_by(composite.config, look.layout)
        waiting: list[tuple[list[int], list[int], list[Medium]]] = []
        asked: str | None = None
        for entry, name in zip(self.entries, self.names, strict=True):
            head = name if name in composite.heads else None
            if waiting and (len(waiting) == together or head != asked):
                yield self._batch(waiting, asked, look)
                waiting = []
            asked, sample, given = head, entry.sample, (self.parts.tokenizer, self.parts.placeholders, segments)
            tokens = tokenize_prompt(sample.question, *given, sample.where) if head else tokenize(sample, *given)
            learnt = [] if head else [i for i, label in enumerate(tokens.labels[1:]) if label != IGNORED][:most]
            waiting.append((tokens.input_ids, [i - len(tokens.input_ids) for i in learnt], list(tokens.media)))
        yield self._batch(waiting, asked, look)

    def _batch(
        self, rows: Sequence[tuple[list[int], list[int], list[Medium]]], head: str | None, look: Look
    ) -> dict[str, Any]:
        longest = max(len(ids) for ids, _, _ in rows)
        features: dict[str, list[Tensor]] = {}
        for _, _, media in rows:
            for medium in media:
                features.setdefault(medium.kind, []).append(look.features(medium))
        pad = self.parts.tokenizer.pad_token_id
        return {
            "head": head,
            "ids": torch.tensor([[pad] * (longest - len(ids)) + ids for ids, _, _ in rows]),
            "mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _, _ in rows]),
            "learnt": [learnt for _, learnt, _ in rows],
            "features": features,
        }


@torch.no_grad()
def _log_probabilities(composite: MultimodalModel, batch: Mapping[str, Any]) -> Iterator[Tensor]:
    device = composite.get_input_embeddings().weight.device
    ids, mask, features = batch["ids"].to(device), batch["mask"].to(device), batch["features"]
    if batch["head"]:
        settings = composite.asks[batch["head"]].settings
        for row in composite.head_outputs(batch["head"], ids, mask, features):
            yield head_logits(row, settings).float().log_softmax(-1).cpu()
        return
    kept = -min(min(learnt) for learnt in batch["learnt"])
    how: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in signature(composite.causal_lm.forward).parameters:
        how["logits_to_keep"] = kept
    if len(ids) > 1:
        how["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = composite(ids, features=features, attention_mask=mask, **how).logits[:, -kept:]
    for row, learnt in zip(logits, batch["learnt"], strict=True):
        yield row[[place + kept for place in learnt]].float().log_softmax(-1).cpu()


def head_logits(scores: Tensor, settings: HeadSettings) -> Tensor:
    """A head's scores (outputs,) as logits of a choice: among its labels (1, labels); of several labels, whether each
    is right (outputs, 2); of a number, which it is, give or take a tenth of the training rows' deviation, (1, places).
    """
    if not settings.labels:
        places = torch.arange(-8, 8.05, 0.1, device=scores.device)
        return -((scores.clamp(-8, 8) - places)[None] ** 2) / (2 * 0.1**2)
    return torch.stack([scores, torch.zeros_like(scores)], 1) if settings.several else scores[None]


def own_look(features: Features) -> Look:
    """Each medium is encoded once, for tokens and answers alike."""

    @cache
    def seen(medium: Medium) -> Tensor:
        return features.features(medium.kind, features.key(medium)).cpu()

    return Look(features.layout, seen)


class Distance:
    """How far distributions (positions, vocabulary) are from others, row by row: KL(others || these) in nats a token,
    share of equal likeliest tokens, and the largest difference of a log-probability, among tokens that the others give
    at least one in ten thousand.
    """

    def __init__(self) -> None:
        self.divergence = self.agreement = self.largest = 0.0
        self.positions = 0

    def add(self, got: Tensor, reference: Tensor) -> None:
        width = min(got.shape[1], reference.shape[1])
        ours, theirs = got[:, :width], reference[:, :width]
        possible = theirs > -math.inf
        self.divergence += float((theirs.exp() * (theirs - ours))[possible].sum())
        self.agreement += float((ours.argmax(-1) == theirs.argmax(-1)).float().sum())
        largest = float((ours - theirs)[theirs > math.log(LIKELY)].abs().max())
        self.largest = largest if math.isnan(largest) else max(self.largest, largest)
        self.positions += len(ours)


def distances(got: Iterable[Tensor], reference: Sequence[Tensor], base: Sequence[Tensor]) -> dict[str, float]:
    """The measures of a model, see finetune/common/certificate.py; nothing of `got` is kept."""
    ours, bare = Distance(), Distance()
    for row, theirs, untrained in zip(got, reference, base, strict=True):
        ours.add(row, theirs)
        bare.add(row, untrained)
    found = {
        "kl": ours.divergence / ours.positions,
        "agreement": ours.agreement / ours.positions,
        "largest_logit_difference": ours.largest,
        "kl_from_base": bare.divergence / bare.positions,
    }
    # A model of which some number isn't one is infinitely far from any.
    return {name: math.inf if math.isnan(value) else max(0.0, value) for name, value in found.items()}
