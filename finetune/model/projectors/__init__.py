"""Projectors: from an encoder's rows to the LLM's embedding space. Trained, in float32.

Each file defines, with no torch import at module level:

    class Options(PartOptions)                                 what a recipe may set
    def build(width_in, width_out, options) -> torch.nn.Module    (N, L, width_in) -> (N, length(L), width_out)
    def length(rows, options) -> int                           rows out for rows in; raises ModelError where it can't
"""
