"""Targets of `finetune export`: a merged model in the form another engine loads. One file per target, named after it.

A target file imports no torch at module level and defines what `finetune.export._contract.Target` documents:

    class Options(TargetOptions)        what `--option` sets
    TAKES_MEDIA: bool                   whether its answers are compared on questions with media, or on their text only
    def write(model, folder, options) -> ExportedModel
    def answer(folder, probes, options, max_new_tokens) -> EngineAnswers
"""
