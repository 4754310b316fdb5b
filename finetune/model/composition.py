"""What a composite model is made of, as its config keeps it; and how many placeholder tokens its media take."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from finetune.common.errors import ModelError
from finetune.common.registry import load_part
from finetune.data.sample import Layout, Medium
from finetune.model.bindings import TaskBinding
from finetune.model.encoders import Encoder, EncoderSettings
from finetune.recipe.parts import FusionPart, ProjectorPart
from finetune.recipe.schema import Limits, Section

if TYPE_CHECKING:
    import torch

BASE_FILE = "finetune.json"  # of a merged base: its composition, which its own config has no place for
HEADS_FILE = "heads.finetune"  # safetensors, under a name that engines don't take for weights of theirs
MERGED_FORMAT = 1  # of merged folders
PLACEHOLDERS = {"image": "<|image|>", "audio": "<|audio|>", "video": "<|video|>"}


class Segment(NamedTuple):
    """A segment of a medium in the text: the mark before it ("0.5s ", or nothing) and its placeholder tokens."""

    mark: str
    tokens: int


Segments = Callable[[Medium], list[Segment]]
# Positions in three dimensions (3, T) of token ids (T,) with these media, in the order of their placeholders.
Rope = Callable[[Sequence[int], Sequence[tuple[str, Layout]]], list[list[int]]]


@dataclass(frozen=True)
class PlacedMedia:
    """The segments of a medium, by `layout`; and where the base's positions have three dimensions, those of a text."""

    placement: "Placement"
    layout: Callable[[Medium], Layout]

    def __call__(self, medium: Medium) -> list[Segment]:
        return self.placement.segments(medium.kind, self.layout(medium))

    def positions(self, input_ids: Sequence[int], media: Sequence[Medium]) -> list[list[int]] | None:
        """(3, T); None where the positions are 0, 1, 2, ..."""
        if self.placement.rope is None or not media:
            return None
        return self.placement.rope(input_ids, [(medium.kind, self.layout(medium)) for medium in media])


@dataclass(frozen=True)
class Placement:
    """How projected media are placed in the text: known before the model runs, and before there is an LLM. `rope`: of
    bases whose positions have three dimensions. `prompts_both_ways`: whether the base attends both ways in
    prompts; of a conversation only the last answer is learned then, as all before it is its prompt.
    """

    projectors: Mapping[str, ProjectorPart]
    fusion: FusionPart
    rope: Rope | None = None
    prompts_both_ways: bool = False

    def tokens(self, medium: str, rows: int) -> int:
        """Placeholder tokens for a segment of `rows` feature rows. Raises ModelError where they can't be projected."""
        projector = self.projectors.get(medium)  # a base has none of ours
        try:
            projected = rows if projector is None else projector.length(rows)
        except ModelError as error:
            raise ModelError(f"model.projectors.{medium}: {error}") from None
        return self.fusion.placeholders(projected)

    def segments(self, medium: str, layout: Layout) -> list[Segment]:
        count = self.tokens(medium, layout.rows)
        end = [Segment(layout.end, 0)] if layout.end else []
        return [*(Segment(mark, count) for mark in layout.marks), *end]

    def segments_by(self, layout: Callable[[Medium], Layout]) -> PlacedMedia:
        """The segments of a medium whose layout `layout` gives."""
        return PlacedMedia(self, layout)


class SavedEncoder(Section):
    """`settings`: what the encoder's file needs to restore it without its original folder."""

    kind: str
    settings: EncoderSettings

    def restore(self, dtype: "torch.dtype") -> Encoder:
        """The encoder, with weights still to be loaded."""
        encoder: Encoder = load_part("encoders", self.kind).restore(self.settings, dtype)
        return encoder


class SavedProjector(Section):
    """`width_in`: of the features that it takes."""

    part: ProjectorPart
    width_in: int


class Composition(Section, strict=False):
    """`base`: whether the LLM is an existing model with encoders and projectors of its own, so that there are none
    here. `placeholders`: medium -> token id; `media`: bounds of what is decoded; `format`: of a merged folder;
    `order`: of the media in the fusion, where one reads what those before it have added (the keys of a config are
    sorted).
    """

    format: int = MERGED_FORMAT
    base: bool = False
    encoders: dict[str, SavedEncoder] = Field({})
    projectors: dict[str, SavedProjector] = Field({})
    order: tuple[str, ...] = ()
    fusion: FusionPart = FusionPart.of("prefix")
    placeholders: dict[str, int] = Field({})
    bindings: dict[str, TaskBinding] = Field({})
    media: Limits = Limits()

    @property
    def ordered_projectors(self) -> dict[str, SavedProjector]:
        return {name: self.projectors[name] for name in self.order or self.projectors}

    @property
    def placement(self) -> Placement:
        return Placement({name: saved.part for name, saved in self.projectors.items()}, self.fusion)
