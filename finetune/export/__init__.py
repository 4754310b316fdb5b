"""Targets: a merged model as another engine loads it. A part's file is its name.

Each file defines, with no torch import at module level:

    class Options(PartOptions)                     what `--option` may set; among them `min_equal`: the share of probes
                                                   whose first tokens must be those of our own generation
    def write(source: Source, folder, options)     -> Written: what it is loaded as, and why so. Raises ExportRefused
                                                   where the target can't hold this model exactly, with the reason
    def answer(folder, probes: Sequence[Probe], options, max_new_tokens) -> Answered
                                                   the same questions, greedily, in the target, in a process of its own.
                                                   Raises EngineMissing where the target isn't installed, with what to
                                                   install
    TAKES_MEDIA = False                            where the target takes text alone: questions then come without media

`folder` exists and is empty; it appears under its name only when all has gone well. Files of which packages know
nothing begin with an underscore.
"""
