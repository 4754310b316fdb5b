"""Fusion: how projected media meet the text. Each file is a `FusionContract` and imports no torch at module level.

Shapes: B rows of T tokens, D wide as the LLM is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from finetune.common.registry import PartOptions

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class Projected:
    """All media of one kind in a batch."""

    placeholder: "Tensor"  # bool (B, T): whether a token is one of their placeholders
    rows: "Tensor"  # (M, D): the projected rows, in the order of the placeholders
    lengths: list[int]  # rows of each of their segments, M in all


class Fusion(Protocol):
    """What `FusionContract.build` returns: a torch.nn.Module with these members."""

    strength: dict[str, float] | None  # per medium; None if the fusion has no such factor

    def forward(self, embeddings: "Tensor", media: Mapping[str, Projected], samples: "Tensor") -> "Tensor":
        """Embeddings (B, T, D) and the media of each name -> embeddings (B, T, D). `samples`, int (B, T): the number of
        the packed sample that a token belongs to.
        """

    def attach(self, decoder_layers: "nn.ModuleList") -> None:
        """Attach to the LLM's layers; called once, before anything runs."""

    def detach_layers(self) -> None:
        """Undo `attach`; called before the LLM is used without media."""

    def forget(self) -> None:
        """Release the media of the last batch; called after the LLM has run, if no gradient will follow."""


class FusionContract(Protocol):
    """What the file of a fusion defines."""

    TRAINED: bool  # whether it has weights, which a stage trains as 'fusion'
    BY_SAMPLE: bool  # whether tokens find media by the sample they're in: samples share a prefix if it holds all media
    Options: type[PartOptions]

    def placeholders(self, rows: int, options: Any) -> int:
        """The number of placeholder tokens of a segment with `rows` projected rows."""

    def build(self, language_model_config: Any, names: Sequence[str], options: Any) -> "nn.Module":
        """A `Fusion` for an LLM of this transformers config and media of these names. Raises ModelError."""
