"""Heads: what is read off the LLM where its answer would begin.

Each file defines, with no torch import at module level:

    TRAINED: bool                                     whether it has weights, which a stage trains as 'heads'
    class Options(PartOptions)                        what a recipe may set
    def settings(targets, options) -> dict            what it must know of the training rows' targets, as JSON holds it;
                                                      without weights, of their answers' text

and where it has weights:

    def build(width, settings, options) -> torch.nn.Module      last hidden states (K, width) -> scores (K, outputs)
    def encode(target, settings) -> list[float]       a target -> what `loss` compares scores with
    def loss(scores, targets, groups, settings, options) -> Tensor    (K, outputs), (K, outputs), (K,) -> (K,), one a
                                                      sample; equal `groups` are samples of one group
    def answer(scores, settings, options) -> Answer   of one sample, a list of floats

A target is what the sample's task is scored against: text, a list of labels, a number, or {"relevance": a number, ...}.
"""

from finetune.recipe.schema import Section


class HeadSettings(Section, strict=False):
    """What a head learned from the training rows: labels (and their weights in the loss), of which a row has one or
    `several`; or mean and deviation of the numbers.
    """

    labels: tuple[str, ...] = ()
    several: bool = False
    weights: tuple[float, ...] = ()
    mean: float | None = None
    deviation: float | None = None
