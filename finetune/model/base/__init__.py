"""Existing models that take media, as a recipe's `model.base`: LLaVA, Qwen-VL, Gemma 3 and their kin, as transformers
loads them, with their own processors and chat templates.

A base is the composite's language model: its decoder reads what the base's own encoders and projectors make of media.
Roles are found by transformers' accessors and by trial, never by the names of modules.
"""
