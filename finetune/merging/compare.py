"""Two models on the same rows: next-token distributions and answers."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor

from finetune.common.certificate import Measures, ModelScores
from finetune.data.sample import Layout, Medium, Sample
from finetune.evaluation.scores import answers_to, scored
from finetune.model.assistant import Assistant
from finetune.model.base.both_ways import answer_types
from finetune.model.composite import MultimodalModel
from finetune.model.features import Features, MediaView
from finetune.model.heads import HeadSettings
from finetune.model.language_model import without_adapter
from finetune.model.prefixes import prompt_tokens
from finetune.model.prompts import PromptBatch, head_outputs
from finetune.model.run import Run
from finetune.model.tokenize import IGNORED, Tokens

POSITIONS = 1024  # limit of next-token distributions kept for comparison
LOGITS = 2**26  # limit of logits kept for comparison
LIKELY = 1e-4


@dataclass(frozen=True)
class ComparedSamples:
    """Held-out samples that models are compared on: all for their next tokens, `answered` also for their scores."""

    run: Run
    samples: Sequence[Sample]
    answered: Sequence[Sample]

    @property
    def media(self) -> dict[str, int]:
        """{kind: media shown}."""
        kinds = [medium.kind for sample in self.samples for medium in sample.media]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}

    @property
    def primary(self) -> dict[str, str]:
        """{task binding: its main metric}."""
        return {sample.task: self.run.bindings[sample.task].task.primary for sample in self.samples}

    def scores(
        self, composite: MultimodalModel, features: Features, view: MediaView, bare: bool = False
    ) -> ModelScores | None:
        """Of the answers; None for a metric that these rows don't have, and where none are to be answered. `bare`:
        without the adapter.
        """
        if not self.answered:
            return None
        tokenizer, placeholders = self.run.components.tokenizer, self.run.components.placeholders
        assistant = Assistant(composite, tokenizer, placeholders, features.encoders, features.limits)
        with without_adapter(composite.language_model) if bare else nullcontext():
            answers = answers_to(assistant, self.answered, self.run.recipe.evaluate, view)
        return {
            name: {metric: round(value, 4) if math.isfinite(value) else None for metric, value in metrics.items()}
            for name, metrics in scored(self.run.bindings, self.answered, answers).items()
        }

    def next_tokens(
        self, composite: MultimodalModel, view: MediaView, bare: bool = False, batch: int = 1
    ) -> Iterator[Tensor]:
        """A sample after the other: log-probabilities of the tokens of its answer (positions, vocabulary), float32; of
        a head with weights see `head_logits`. `bare`: without the adapter. `batch`: samples at once.
        """
        limit = min(POSITIONS, LOGITS // composite.config.text_config.vocab_size) // len(self.samples)
        if not composite.llm_takes("position_ids"):
            batch = 1  # padding would move the positions
        with without_adapter(composite.language_model) if bare else nullcontext():
            for head, chunk in self._batches(composite, batch):
                segments = composite.placement.segments_by(view.layout)  # the compared model's own
                # As they are trained: without the answer where a head gives it.
                tokens = [self.run.tokens(sample, not head, segments) for sample in chunk]
                yield from self._log_probabilities(composite, tokens, head, view, max(1, limit))

    def _batches(self, composite: MultimodalModel, size: int) -> Iterator[tuple[str | None, list[Sample]]]:
        """(head with weights that answers, up to `size` samples in a row that it answers)."""
        for head, group in groupby(self.samples, lambda s: s.task if s.task in composite.heads else None):
            while chunk := list(islice(group, size)):
                yield head, chunk

    @torch.no_grad()
    def _log_probabilities(
        self, composite: MultimodalModel, samples: Sequence[Tokens], head: str | None, view: MediaView, limit: int
    ) -> Iterator[Tensor]:
        """`limit`: of the positions of each sample."""
        device = composite.get_input_embeddings().weight.device
        pad = self.run.components.tokenizer.pad_token_id
        batch = PromptBatch.of(samples, view, pad, device)
        if head:
            settings = composite.bindings[head].settings
            for row in head_outputs(composite, head, batch):
                yield head_logits(row, settings).float().log_softmax(-1).cpu()
            return
        positions = [  # of the states that predict the answer, counted from the end
            [i - len(tokens.input_ids) for i, label in enumerate(tokens.labels[1:]) if label != IGNORED][:limit]
            for tokens in samples
        ]
        count = -min(map(min, positions))  # of the last positions, whose logits are computed
        options: dict[str, Any] = {"use_cache": False}
        if composite.placement.prompts_both_ways:
            options["token_type_ids"] = answer_types(
                batch.attention_mask, [prompt_tokens(tokens.labels) for tokens in samples]
            )
        if composite.llm_takes("logits_to_keep"):
            options["logits_to_keep"] = count
        if len(samples) > 1 or batch.rope_positions is not None:
            options["position_ids"] = batch.position_ids
        options |= {"features": batch.features, "attention_mask": batch.attention_mask}
        logits = composite(batch.input_ids, **options).logits[:, -count:]
        for row, places in zip(logits, positions, strict=True):
            yield row[[place + count for place in places]].float().log_softmax(-1).cpu()


def head_logits(scores: Tensor, settings: HeadSettings) -> Tensor:
    """A head's scores (outputs,) as logits of a choice: among its labels (1, labels); of several labels, whether each
    is right (outputs, 2); of a number, which it is, give or take a tenth of the training rows' deviation, (1, places).
    """
    if not settings.labels:
        places = torch.arange(-8, 8.05, 0.1, device=scores.device)
        return -((scores.clamp(-8, 8) - places)[None] ** 2) / (2 * 0.1**2)
    return torch.stack([scores, torch.zeros_like(scores)], 1) if settings.several else scores[None]


class EncodedOnce:
    """Each medium is encoded once, for tokens and answers alike."""

    def __init__(self, features: Features) -> None:
        self._features = features
        self._encoded: dict[Medium, Tensor] = {}

    def layout(self, medium: Medium) -> Layout:
        return self._features.layout(medium)

    def features(self, medium: Medium) -> Tensor:
        if medium not in self._encoded:
            self._encoded[medium] = self._features.features(medium).cpu()
        return self._encoded[medium]


class Distance:
    """Distance of distributions (positions, vocabulary) from reference ones, sample by sample: KL(reference || these)
    in nats per token, the share of equal most likely tokens, and the largest difference of a log-probability, among
    tokens to which the reference gives at least one in ten thousand.
    """

    def __init__(self) -> None:
        self.divergence = self.agreement = self.largest = 0.0
        self.positions = 0

    def add(self, log_probabilities: Tensor, reference: Tensor) -> None:
        width = min(log_probabilities.shape[1], reference.shape[1])
        ours, theirs = log_probabilities[:, :width], reference[:, :width]
        possible = theirs > -math.inf
        self.divergence += float((theirs.exp() * (theirs - ours))[possible].sum())
        self.agreement += float((ours.argmax(-1) == theirs.argmax(-1)).float().sum())
        largest = float((ours - theirs)[theirs > math.log(LIKELY)].abs().max())
        self.largest = largest if math.isnan(largest) else max(self.largest, largest)
        self.positions += len(ours)


def distances(
    log_probabilities: Iterable[Tensor],
    reference: Sequence[Tensor],
    base: Sequence[Tensor],
    scores: ModelScores | None = None,
) -> Measures:
    """The measures of a model; nothing of `log_probabilities` is kept."""
    trained, bare = Distance(), Distance()
    for row, theirs, untrained in zip(log_probabilities, reference, base, strict=True):
        trained.add(row, theirs)
        bare.add(row, untrained)

    def bounded(value: float) -> float:
        return math.inf if math.isnan(value) else max(0.0, value)  # such a model is infinitely far from any

    return Measures(
        kl=bounded(trained.divergence / trained.positions),
        agreement=bounded(trained.agreement / trained.positions),
        largest_logit_difference=bounded(trained.largest),
        kl_from_base=bounded(bare.divergence / bare.positions),
        scores=scores,
    )
