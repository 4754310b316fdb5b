"""Tasks: the question that a row becomes, and how its answers are read and scored. A part's file is its name.

Each file defines, with no torch import at module level:

    class Options(PartOptions)                            what a recipe may set
    def media(options) -> tuple[str, ...]                 the kinds of media its rows carry: ("image",)
    def sample(row: Row, options) -> Sample               one row of a file -> one conversation with its media
    def read(answer: Answer, options) -> Any              what a head said -> a prediction that JSON can hold; None
                                                          where it can't be read
    def measure(prediction, target, options) -> dict      one row of what `score` sums up; "good": how good the
                                                          prediction is, more is better. `target` is the sample's own,
                                                          or else its answer as `read` reads it. All that costs time
                                                          is done here
    def score(rows: list[dict], options) -> dict[str, float]    metric -> finite value over one or more rows of
                                                          `measure`; less is better where the name holds "error". A
                                                          metric that these rows can't tell is left out
    HEADS: tuple[str, ...]                                the heads that can answer it, the usual one first
    PRIMARY: str                                          the metric that stands for the task

and may define `tables(rows, options) -> dict`, for the report: "confusion" {"labels", "counts"}, "per_label"
{label: {metric: value}}. The counts have a row for each right label, and one column more: answers that are no label.

Rows of `measure` that are to be resampled together have the same "group".
"""
