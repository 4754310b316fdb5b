"""Encoders: models that turn media into rows of numbers, frozen unless a recipe tunes them. One file per kind of
interface, not per brand.

Each file defines, with no torch import at module level:

    MEDIUM: str                         the kind of media it takes: "image", "audio" or "video"
    class Options(PartOptions)          what a recipe may set
    def build(options, dtype, device) -> Encoder          frozen, with its weights
    def restore(settings, dtype) -> Encoder               the same from `Encoder.settings()`, weights to be loaded

An Encoder has

    module: torch.nn.Module             holds the weights
    width: int                          of a row of features
    fingerprint: str                    equal for equal features: sha256 of weights, preprocessing and options
    sampling: dict                      keywords for `media.decode`: which frames of a video; {} otherwise
    layout: Layout | None               of every medium, where it doesn't depend on the medium
    prepare(decoded) -> Prepared        on CPU, in a data worker
    encode(batch) -> Tensor             (N, *values.shape) -> (N, S, L, W): S segments of L rows, as `prepare` said
    settings() -> dict                  what `restore(settings)` needs to rebuild it without its original folder
"""
