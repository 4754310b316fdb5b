"""From the plain values of a recipe to the parts in memory: the same for training, evaluation and merging."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from finetune.common.registry import load_part
from finetune.data.media import example
from finetune.data.sample import Layout, Medium
from finetune.model import adapter
from finetune.model.asks import Ask
from finetune.model.composite import PLACEHOLDERS, MultimodalConfig, MultimodalModel, compose, segments_of
from finetune.model.language_model import default_device, load_language_model, load_tokenizer, resolve_dtype
from finetune.model.tokenize import Placeholder, Segments, add_placeholders
from finetune.model.tuned_encoder import TunedEncoder, tune_encoder


@dataclass
class Parts:
    """What a composite is made of, before the LLM is loaded. `encoders`: {name: (kind, Encoder)}."""

    tokenizer: Any
    placeholders: dict[str, Placeholder]
    encoders: dict[str, tuple[str, Any]]
    projectors: dict[str, tuple[str, Any]]
    fusion: tuple[str, Any]
    dtype: torch.dtype
    device: torch.device
    tuned: dict[str, TunedEncoder]


def load_parts(
    *,
    llm: Mapping[str, Any],
    encoders: Mapping[str, tuple[str, Any]],
    projectors: Mapping[str, tuple[str, Any]],
    fusion: tuple[str, Any],
    tune_encoders: Mapping[str, Mapping[str, Any]],
    seed: int,
    device: torch.device | None = None,
) -> Parts:
    """Load tokenizer and encoders. `llm`: the recipe's `model.llm` as keywords; `tune_encoders`: {name: keywords of
    `tune_encoder`}; the others {name: (kind, Options)}. The same seed gives the same new weights.
    """
    from transformers import set_seed

    device = device or default_device()
    dtype = resolve_dtype(llm["dtype"], device)
    tokenizer = load_tokenizer(
        llm["name"],
        revision=llm["revision"],
        chat_template=llm["chat_template"],
        trust_remote_code=llm["trust_remote_code"],
    )
    built = {
        name: (kind, load_part("encoders", kind).build(options, dtype, device))
        for name, (kind, options) in encoders.items()
    }
    set_seed(seed)
    tuned = {name: tune_encoder(built[name][1], example(name), **how) for name, how in tune_encoders.items()}
    return Parts(
        tokenizer,
        add_placeholders(tokenizer, sorted(encoders), PLACEHOLDERS),
        built,
        dict(projectors),
        fusion,
        dtype,
        device,
        tuned,
    )


def load_llm(parts: Parts, llm: Mapping[str, Any]) -> Any:
    """The LLM, quantized as `llm`, the recipe's `model.llm`, says."""
    return load_language_model(
        llm["name"],
        revision=llm["revision"],
        quantize=llm["quantize"],
        double_quantize=llm["double_quantize"],
        dtype=parts.dtype,
        attention=llm["attention"],
        device=parts.device,
        trust_remote_code=llm["trust_remote_code"],
    )


def build_model(
    parts: Parts,
    *,
    llm: Mapping[str, Any],
    adapter_options: Mapping[str, Any] | None,
    seed: int,
    with_encoders: bool,
    asks: Mapping[str, Ask],
    language_model: Any = None,
) -> MultimodalModel:
    """Load the LLM, quantized as `llm` says, or take the one that is there, and put everything together. The same seed
    gives the same new weights.
    """
    from transformers import set_seed

    language_model = language_model or load_llm(parts, llm)
    set_seed(seed)
    model = compose(
        language_model,
        encoders=parts.encoders,
        projectors=parts.projectors,
        fusion=parts.fusion,
        placeholder_ids={name: placeholder.id for name, placeholder in parts.placeholders.items()},
        asks=asks,
        with_encoders=with_encoders,
    )
    if with_encoders:
        model.tuned = {name: tuned.names for name, tuned in parts.tuned.items()}
    if adapter_options is not None:
        adapter.attach(model, **adapter_options)
    return model.eval()


def composite_config(parts: Parts) -> MultimodalConfig:
    """What tells the number of placeholders before there is an LLM."""
    projectors = {
        name: {"kind": kind, "options": options.model_dump()} for name, (kind, options) in parts.projectors.items()
    }
    kind, options = parts.fusion
    return MultimodalConfig(parts={"projectors": projectors, "fusion": {"kind": kind, "options": options.model_dump()}})


def segments_by(model_config: Any, layout: Callable[[Medium], Layout]) -> Segments:
    """(mark, placeholder tokens) of a medium's segments, from its layout, projector and fusion."""
    return lambda medium: segments_of(model_config, medium.kind, layout(medium))
