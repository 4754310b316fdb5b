"""Tasks: what is asked of the model, and how its answers are scored.

Each file defines, with no torch import at module level:

    class Options(PartOptions)                            what a recipe may set
    def media(options) -> tuple[str, ...]                 the kinds of media its rows carry: ("image",)
    def sample(row: Row, options) -> Sample               one row of a file -> one conversation with its media
    def read(answer: str, options) -> str                 what the model wrote -> a prediction
    def score(predictions, targets, options) -> dict[str, float]    metric -> value, both sides lists of str; less is
                                                          better where the name holds "error"
    PRIMARY: str                                          the metric that stands for the task
"""
