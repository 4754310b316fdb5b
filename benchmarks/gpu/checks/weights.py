"""Writes the large LLM and its encoder, as folders that both sides of the comparison load."""

import torch

from benchmarks.gpu.models import fresh_tokenizer
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.weights import write_llm
from benchmarks.train_vs_trl.prepare import make_vision


def check(setting: Setting) -> str:
    size = write_llm(setting, setting.folder / "llm", fresh_tokenizer())
    torch.manual_seed(1)
    make_vision(setting.folder / "vision", setting.vision)
    rows = (setting.vision["image_size"] // setting.vision["patch_size"]) ** 2
    return f"an LLM of {size / 2**30:.1f} GiB in nf4, an encoder that makes {rows} tokens of a picture"
