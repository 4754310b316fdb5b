"""Gradients through 4-bit weights, against those through the same weights dequantized to float32."""

import torch

from benchmarks.gpu.models import apart, composite, in_one_row, llm_folder
from benchmarks.gpu.setting import Setting
from finetune.model.language_model import load_language_model
from finetune.model.row_layout import RowKind
from finetune.recipe.schema import Llm

BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}  # relative errors


def check(setting: Setting) -> str:
    llm, device = Llm(name=str(llm_folder(setting, "llama"))), torch.device(setting.device)
    figures = []
    for dtype, bound in BOUNDS.items():
        expected = composite(load_language_model(llm, dtype, device).dequantize().float())
        exact = apart(expected, setting, torch.float32)
        del expected
        model = composite(load_language_model(llm, dtype, device))
        kinds = {type(module.base_layer).__name__ for module in model.modules() if hasattr(module, "base_layer")}
        assert kinds == {"Linear4bit"}, f"LoRA lies on {kinds}"
        found = {"apart": apart(model, setting, dtype), "shared": in_one_row(model, setting, dtype, RowKind.SHARED)}
        model.causal_lm.activation_checkpointing_enable(every_n_layers=1)
        found["checkpoints"] = in_one_row(model.train(), setting, dtype, RowKind.SHARED)
        errors = {name: one.errors(exact) for name, one in found.items()}
        assert max(map(max, errors.values())) <= bound, f"{dtype}: errors of losses and gradients {errors}"
        figures.append(f"{str(dtype)[6:]} {max(error for _, error in errors.values()):.1e}")
    return f"greatest error of gradients: {', '.join(figures)}"
