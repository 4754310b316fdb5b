"""Projectors map features to the width of the LLM; always trained, in float32. Each file is a `ProjectorContract` and
imports no torch at module level.
"""

from typing import TYPE_CHECKING, Any, Protocol

from finetune.common.registry import PartOptions

if TYPE_CHECKING:
    from torch import nn


class ProjectorContract(Protocol):
    """What the file of a projector defines."""

    Options: type[PartOptions]

    def build(self, width_in: int, width_out: int, options: Any) -> "nn.Module":
        """A module from the rows of N segments (N, L, width_in) to (N, length(L), width_out); segments don't mix."""

    def length(self, rows: int, options: Any) -> int:
        """The number of projected rows of a segment with `rows` rows. Raises ModelError if it can't take that many."""
