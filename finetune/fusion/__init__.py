"""Fusion: how projected media meet the text.

Each file defines, with no torch import at module level:

    class Options(PartOptions)                        what a recipe may set
    def placeholders(rows, options) -> int            placeholder tokens of a medium with `rows` projected rows
    def build(language_model_config, options) -> torch.nn.Module
                                                      forward(embeddings (B, T, D), is_placeholder (B, T) bool,
                                                      media (M, D)) -> embeddings (B, T, D)
"""
