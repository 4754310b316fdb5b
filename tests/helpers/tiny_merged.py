"""Merged folders of random or real parts, as `finetune merge` leaves them, without training anything."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tiny import fresh_tokenizer, part, tiny_llm

from finetune.model.compose import compose
from finetune.model.composition import PLACEHOLDERS
from finetune.model.tokenize import add_placeholders, answer_ends
from finetune.recipe.parts import ProjectorPart

# Half as many rows as the tokenizer has tokens would do; placeholders stand behind the table, as where one has grown.
VOCABULARY = 416
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}  # heads of 32: the least vLLM takes


def wide_llm(family: str = "llama", **changes: Any) -> Any:
    """A tiny LLM whose attention every engine can compute."""
    tokenizer = fresh_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    sizes = WIDTHS | {"num_key_value_heads": 2, "head_dim": 32}
    model = tiny_llm(family, vocabulary=len(tokenizer), **(sizes | ends | changes))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def tiny_merged(
    folder: Path,
    encoders: Mapping[str, Any],
    projectors: Mapping[str, ProjectorPart],
    *,
    llm: Any = None,
    tokenizer: Any = None,
    fusion: str = "prefix",
    louder: float = 1.0,
    **kwargs: Any,
) -> Path:
    """`encoders`: {medium: a built encoder}. Projected rows are `louder` times what a fresh projector makes of them, so
    that other media are answered otherwise.
    """
    llm = llm or wide_llm()
    tokenizer = tokenizer or fresh_tokenizer()
    placeholders = add_placeholders(tokenizer, sorted(encoders), PLACEHOLDERS)
    torch.manual_seed(1)
    model = compose(
        llm,
        encoders=encoders,
        projectors=projectors,
        fusion=part("fusion", fusion),
        placeholder_ids={name: placeholder.id for name, placeholder in placeholders.items()},
        **kwargs,
    )
    with torch.no_grad():
        for projector in model.projectors.values():
            last = [module for module in projector.modules() if isinstance(module, torch.nn.Linear)][-1]
            last.weight.mul_(louder)
    model.config.dtype = llm.dtype
    model.save_pretrained(folder)
    llm.generation_config.eos_token_id = answer_ends(tokenizer, llm.generation_config)
    llm.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def merged_with_adapter(folder: Path, encoders: Mapping[str, Any], projectors: Mapping[str, Any]) -> Path:
    """FOLDER/merged, and the LoRA in it, of random weights that are felt, in FOLDER/adapter."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    wrapped = get_peft_model(wide_llm(), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    wrapped.save_pretrained(folder / "adapter")
    return tiny_merged(folder / "merged", encoders, projectors, llm=wrapped.merge_and_unload(), louder=5)
