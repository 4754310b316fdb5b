"""Tasks: the question that a row becomes, and how its answers are read and scored. Each file is a `TaskContract` and
imports no torch at module level.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Protocol, TypeAlias

from pydantic import Field

from finetune.common.registry import PartOptions
from finetune.data.formats import Columns
from finetune.data.sample import Answer, Row, Sample

Measure: TypeAlias = dict[str, Any]
"""One prediction against its target: the counts and values that `score` sums up over rows. "good": how good it is, more
is better. "group", where rows must be resampled together: equal for those of one group.
"""
Tables: TypeAlias = dict[str, Any]
"""JSON for the report. "confusion": {"labels", "counts"} with a row of counts for each right label, and a last column
for answers that are no label; "per_label": {label: {metric: value}}; "groups": numbers of groups.
"""

Media = Annotated[tuple[str, ...], Field(description="Kinds of media, each in the column of its name; [] for none.")]
Prompt = Annotated[str, Field(description="The question, put after the media and the text; '' for none.")]
Transcript = Annotated[str, Field(description="Column that describes or transcribes the media, for `distill`.")]


class TaskOptions(PartOptions):
    """Options of every task."""

    media: Media = ("image",)


class TaskContract(Protocol):
    """What the file of a task defines. Two are optional: `tables(rows, options) -> Tables`, and
    `group_of(row, options) -> str`: in what group a row has a rank by its prediction, a number, the highest first.
    """

    HEADS: tuple[str, ...]  # the heads that can answer it, the usual one first
    PRIMARY: str  # the metric that stands for the task, where rows have it; else it is the first of their scores
    Options: type[TaskOptions]

    def sample(self, row: Row, options: Any) -> Sample:
        """A row as a conversation with its media. Raises DataError."""

    def stand_in(self, row: Row, options: Any) -> Columns:
        """Columns that take the place of a row's answer where it isn't known or isn't to be read: with them `sample`
        asks the row's question.
        """

    def read(self, answer: Answer, options: Any) -> Any:
        """An answer as a prediction, which JSON can hold; None if it can't be read."""

    def measure(self, prediction: Any, target: Any, options: Any) -> Measure:
        """`target`: `Sample.target`, or if that is None the sample's answer as `read` reads it. Whatever takes time is
        computed here, since `score` runs a thousand times in the bootstrap.
        """

    def score(self, rows: Sequence[Measure], options: Any) -> dict[str, float]:
        """Metric -> finite value over one or more rows; less is better if the name contains "error". Metrics that
        aren't defined for these rows are left out.
        """
