"""Targets of `finetune export`: a merged model in the form another engine loads. One file per target, named after it.

A target file imports no torch at module level and defines what `finetune.export._contract.Target` documents.
"""
