"""Liger's kernels for the LLM's layers (https://github.com/linkedin/Liger-Kernel), by transformers' own integration."""

from typing import Any

from transformers.integrations.liger import apply_liger_kernel

from finetune.common.progress import console

# The head stays ours: it scores learned tokens alone.
KERNELS = {"rms_norm": True, "rope": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}


def use_liger(causal_lm: Any) -> None:
    """Replace norms, rotary positions and SwiGLU of an LLM on a GPU; those of its family in this process for good. Says
    where that isn't possible.
    """
    if causal_lm.device.type == "cpu":
        console.print("train.liger: left out on a CPU, its kernels are for GPUs")
    if causal_lm.device.type != "cuda":  # nor where a plan has tensors without data
        return
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    family = causal_lm.config.model_type
    if family not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        console.print(f"train.liger: left out, Liger has no kernels for LLMs of the type {family}")
        return
    apply_liger_kernel(causal_lm, KERNELS)
