"""What a plan knows of the rows: some of them tokenized, and how many there are."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from finetune.common.run_folder import RunFolder
from finetune.data.rows import read_splits, refuse_empty_splits, refuse_unfit, sampling_weights
from finetune.data.sample import Medium, Prepared, Sample
from finetune.model.bindings import TaskBinding, bindings_of
from finetune.model.build import load_components
from finetune.model.composite import MultimodalModel
from finetune.model.features import Features
from finetune.model.row_layout import RowKind
from finetune.model.run import Run
from finetune.recipe.load import Recipe
from finetune.recipe.parts import ObjectivePart
from finetune.recipe.schema import Stage
from finetune.training.collate import Batch, Collator, PackedRow
from finetune.training.pack import Row
from finetune.training.plan.shapes import META
from finetune.training.prefixes import rows_of
from finetune.training.rollouts import rollout_rows, row_kind_of_answers
from finetune.training.samples import TokenizedSamples, compared, distilled, prompts, tokenized
from finetune.training.steps import samples_of

READ = 256  # training rows that are tokenized; the others are taken to be like them
DECODED = 8  # media that are decoded, of those whose size isn't known before
T = TypeVar("T")


@dataclass(frozen=True)
class PlannedRows:
    """`training`: some of the training rows of each source, taken evenly; `sources`: {source: number of all of them};
    `media`: {kind: number in all training rows}; `held_out`: rows that are scored.
    """

    training: list[Sample]
    bindings: dict[str, TaskBinding]
    sources: Counter[int]
    held_out: int
    media: dict[str, int]

    @property
    def count(self) -> int:
        return self.sources.total()

    @classmethod
    def of(cls, recipe: Recipe) -> "PlannedRows":
        """Raises DataError."""
        splits = read_splits(recipe.data, recipe.seed, recipe.media.max_bytes, recipe.file)
        refuse_empty_splits(splits, recipe)
        refuse_unfit(splits, recipe)
        scored = len(splits.of(recipe.evaluate.split))
        return cls(
            training=evenly_of_sources(splits.train),
            bindings=bindings_of(recipe.data, splits.train),
            sources=Counter(splits.train.sources.tolist()),
            held_out=min(scored, recipe.evaluate.limit or scored),
            media=splits.train.kinds(),
        )


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most so many, from all over the sequence."""
    return list(items[:: -(-len(items) // most)]) if items else []


def evenly_of_sources(samples: Sequence[Sample]) -> list[Sample]:
    """About READ samples, of each source its share: whole groups of those whose first medium is the same, at least
    one.
    """
    sources: dict[int, dict[object, list[Sample]]] = {}
    for number, sample in enumerate(samples):
        first = sample.media[0].path if sample.media else number
        sources.setdefault(sample.source, {}).setdefault(first, []).append(sample)
    chosen = (evenly(list(own.values()), max(1, READ * len(own) // len(samples))) for own in sources.values())
    return [sample for groups in chosen for group in groups for sample in group]


@dataclass(frozen=True)
class StageRows:
    """A stage's samples, its fullest packed row, and how many rows and tokens all its epochs have."""

    samples: TokenizedSamples
    fullest: Row
    rows: int
    tokens: int


class PlannedRun:
    """A run whose encoders are shapes; nothing but configs and tokenizer files is read."""

    def __init__(self, recipe: Recipe, rows: PlannedRows) -> None:
        """`recipe`: with its LLM's dtype named. Raises ModelError, DataError."""
        components = load_components(recipe.model, recipe.tune_encoders, recipe.seed, META)
        features = _Features(components.encoders, None, recipe.media)
        self.run = Run(RunFolder(Path("runs") / recipe.name), recipe, components, features, rows.bindings)
        self.rows = rows
        self.samples = TokenizedSamples.of(tokenized(rows.training, self.run))

    def read(self, medium: Medium) -> Any:
        """A medium as the collator is given it: features, or prepared for its encoder; without values."""
        features, encoder = self.run.features, self.run.components.encoders[medium.kind]
        if not self.run.recipe.train.cache:
            return features.prepared(medium).values
        layout = features.layout(medium)
        return torch.empty(len(layout.marks), layout.rows, encoder.width, dtype=self.run.components.dtype)

    def collator(self, samples: TokenizedSamples, kind: RowKind, heads: bool = False) -> Collator:
        """`heads`: whether heads with weights learn from the rows."""
        return Collator(
            samples,
            self.read,
            field="features" if self.run.recipe.train.cache else "media",
            kind=kind,
            pad_token_id=self.run.components.tokenizer.pad_token_id,
            heads=samples.head_outputs if heads else None,
            prompts_both_ways=self.run.components.placement.prompts_both_ways,
        )

    def stage_rows(self, stage: Stage, model: MultimodalModel, kind: RowKind, seed: int) -> StageRows:
        """As `prepare.stage_rows`, over the rows that were read, then stretched to all."""
        train, objective, once = self.run.recipe.train, stage.objective, stage.model_copy(update={"epochs": 1})
        chosen = samples_of(stage, self.rows.training)
        own = [self.rows.training[i] for i in chosen]
        weights = sampling_weights(own, train.mixing_temperature)
        if objective.samples_answers:  # as many tokens as they may have
            samples = TokenizedSamples.of(prompts(own, objective, self.run))
            lengths = samples.lengths
            packed = rollout_rows(
                train, once, lengths, weights, seed, row_kind_of_answers(kind, model.composition.fusion)
            )
            tokens = [sum(objective.tokens_of(lengths[number]) for (number,) in row) for row in packed]
        else:
            samples = self.samples.select(chosen)
            if objective.needs == "texts":  # the LLM's own answers aren't known yet
                given = stage.model_copy(update={"objective": ObjectivePart.of(objective.kind, answers="given")})
                samples = TokenizedSamples.of(distilled(own, given, self.run, model))
            if objective.compares:
                samples = TokenizedSamples.of(compared(own, objective.needs, self.run))
            packed, sharing = rows_of(samples, weights, once, model, kind, int(train.tokens_per_batch), seed)
            lengths = samples.taught_lengths
            tokens = [sum(sharing.tokens(group, lengths) for group in row) for row in packed]
        stretch = int(stage.epochs) * sum(self.rows.sources[source] for source in {s.source for s in own}) / len(own)
        fullest = packed[tokens.index(max(tokens))]
        return StageRows(samples, fullest, max(round(len(packed) * stretch), 1), round(sum(tokens) * stretch))

    def prompts(self, batch: int) -> Batch:
        """The longest sample so many times, as prompts that are answered at once."""
        longest = max(range(len(self.samples)), key=self.samples.lengths.__getitem__)
        collator = self.collator(self.samples, RowKind.PADDED)
        return collator([PackedRow(groups=[[longest]] * batch, filler=False)])

    def some_media(self, kind: str) -> list[Prepared]:
        """A few media, decoded and prepared."""
        media = [medium for sample in self.rows.training for medium in sample.media if medium.kind == kind]
        return [self.run.features.prepared(medium) for medium in evenly(media, DECODED)]


class _Features(Features):
    """Where layouts differ, only a few media are decoded: the others are taken to be as the longest of these."""

    def layout(self, medium: Medium) -> Any:
        own = (medium.kind, medium.key)
        known = [layout for (kind, _), layout in self._layouts.items() if kind == medium.kind]
        if self.encoders[medium.kind].layout is None and len(known) >= DECODED and own not in self._layouts:
            return max(known, key=lambda layout: layout.rows * len(layout.marks))
        return super().layout(medium)
