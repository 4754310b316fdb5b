"""The large LLM, with random weights: made on the device, each matrix quantized before the next is made."""

import json
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.gpu.setting import Setting
from finetune.model.language_model import quantization
from finetune.recipe.schema import Llm

SCALE = 0.02  # standard deviation, as models begin


def write_llm(setting: Setting, folder: Path, tokenizer: Any) -> int:
    """A folder of an LLM in nf4 as transformers loads it, a file a layer, and its tokenizer. Returns bytes."""
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        **setting.large_llm,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    files: dict[str, str] = {}  # tensor -> file
    whole = 0
    blocks = {f"model.layers.{number}": layer for number, layer in enumerate(skeleton.model.layers)}
    beside = [name for name, _ in skeleton.named_parameters() if not name.startswith("model.layers.")]
    for name, names in {
        **{block: [f"{block}.{inner}" for inner, _ in layer.named_parameters()] for block, layer in blocks.items()},
        "beside": beside,
    }.items():
        tensors: dict[str, Tensor] = {}
        for parameter in names:
            tensors |= made(parameter, skeleton, setting.device)
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, f"{name}.safetensors")
        whole += sum(tensor.nbytes for tensor in tensors.values())
    config.quantization_config = quantization(Llm(name=str(folder)), torch.bfloat16)
    config.save_pretrained(folder)
    index = {"metadata": {"total_size": whole}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return whole


def made(name: str, skeleton: nn.Module, device: str) -> dict[str, Tensor]:
    """The tensors of one parameter, on the CPU: in nf4 with scales for a matrix, but for embeddings and head."""
    above, _, kind = name.rpartition(".")
    shape = skeleton.get_parameter(name).shape
    if len(shape) == 1:
        weight = torch.zeros(shape) if kind == "bias" else torch.ones(shape)
        return {name: weight.to(torch.bfloat16)}
    weight = torch.randn(shape, dtype=torch.bfloat16, device=device) * SCALE
    if above == "lm_head" or not isinstance(skeleton.get_submodule(above), nn.Linear):
        return {name: weight.cpu()}
    quantized, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    tensors = {name: quantized, **{f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}}
    return {part: tensor.cpu().contiguous() for part, tensor in tensors.items()}
