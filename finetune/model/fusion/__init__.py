"""Fusion: how projected media meet the text.

Each file defines, with no torch import at module level:

    TRAINED: bool                                     whether it has weights, which a stage trains as 'fusion'
    class Options(PartOptions)                        what a recipe may set
    def placeholders(rows, options) -> int            placeholder tokens of a segment with `rows` projected rows
    def build(language_model_config, names, options) -> torch.nn.Module       for the media of these names

The module has

    forward(embeddings, media, samples) -> embeddings (B, T, D); media: {name: Projected}; samples (B, T): which packed
                                          sample a token belongs to
    attach(decoder_layers)                called once, with the LLM's layers
    detach_layers()                       called when the LLM goes on without it
    forget()                              called when the LLM has run and no gradient will follow
    strength: {name: float} | None        factors of what media add; None where the fusion knows none
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Projected:
    """All media of one kind in a batch. `placeholder` (B, T): where their tokens stand; `rows` (M, D): projected, in
    the order of the placeholders; `lengths`: rows of each of their segments, M in all.
    """

    placeholder: "Tensor"
    rows: "Tensor"
    lengths: list[int]
