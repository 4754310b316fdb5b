"""Compiled layers of an LLM, for runs whose names ask for them."""

from typing import Any

from finetune.model.language_model import decoder_layers


def compile_layers(causal_lm: Any) -> None:
    """Compile, when they are first called, norms and feed-forward parts. Attention by segments has another plan for
    each row and would be compiled again and again. On a CPU they are only traced, so that toys needn't wait.
    """
    backend = "inductor" if next(causal_lm.parameters()).is_cuda else "eager"
    for layer in decoder_layers(causal_lm):
        for name, module in layer.named_children():
            if "attn" not in name:
                module.compile(dynamic=True, backend=backend)


def eager_again(causal_lm: Any) -> None:
    """Undo `compile_layers`."""
    for module in causal_lm.modules():
        module._compiled_call_impl = None
