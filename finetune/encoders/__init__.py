"""Encoders: frozen models that turn media into rows of numbers. One file per kind of interface, not per brand.

Each file defines, with no torch import at module level:

    MEDIUM: str                         the kind of media it takes: "image" (later "audio", "video")
    class Options(PartOptions)          what a recipe may set
    def build(options, dtype, device) -> Encoder          frozen, with its weights
    def restore(settings, dtype) -> Encoder               the same from `Encoder.settings()`, weights to be loaded

An Encoder has `module` (the torch module that holds the weights), `width`, `fingerprint`, and

    prepare(medium) -> Tensor           on CPU: decoded medium -> what the module reads, without batch axis
    length(medium: Medium) -> int       rows of features its file will give: known before the model runs
    encode(batch) -> Tensor             (N, ...) -> (N, L, width); L = length
    settings() -> dict                  what `restore(settings)` needs to rebuild it without its original folder
"""
