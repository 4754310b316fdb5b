"""Packed rows, and rows whose samples share what they begin with, against each sample in a row of its own."""

import torch

from benchmarks.gpu.models import apart, composite, in_one_row, llm_folder
from benchmarks.gpu.setting import Setting
from finetune.model.language_model import load_language_model
from finetune.model.row_layout import RowKind, row_kind
from finetune.recipe.schema import Llm

# The second has windows in every other layer, the third attention code of its own.
FAMILIES = {"llama": {}, "gemma3_text": {"head_dim": 64, "sliding_window": 12}, "gemma2": {"head_dim": 64}}
# Times the error of separate rows in the same dtype, and relative errors that rounding alone explains.
WORSE = 2.0
LEAST = {torch.bfloat16: 5e-3, torch.float16: 7e-4}


def check(setting: Setting) -> str:
    figures = []
    for family, changes in list(FAMILIES.items())[: 2 if setting.toy else None]:
        folder = llm_folder(setting, family, family, **changes)
        for dtype in LEAST:
            device = torch.device(setting.device)
            llm = load_language_model(Llm(name=str(folder), quantize="none"), dtype, device)
            kind = row_kind(llm)
            assert kind is RowKind.SHARED, f"{family} in {dtype}: rows would be {kind}, not {RowKind.SHARED}"
            model = composite(llm)
            separate = apart(model, setting, dtype)
            rows = {kind: in_one_row(model, setting, dtype, kind) for kind in (RowKind.SEGMENTS, RowKind.SHARED)}
            exact = apart(model.float(), setting, torch.float32)
            usual = separate.errors(exact)
            for kind, row in rows.items():
                errors = row.errors(exact)
                assert all(e <= WORSE * u + LEAST[dtype] for e, u in zip(errors, usual, strict=True)), (
                    f"{family} in {dtype}, {kind}: errors of losses and gradients {errors}, of separate rows {usual}"
                )
            figures.append(f"{family} {str(dtype)[6:]} {errors[1]:.1e} ({usual[1]:.1e})")
    return f"errors of gradients in shared rows (in separate ones): {', '.join(figures)}"
