"""A merged model as the kit's own class for vLLM (`_serving_class`): what stands in its folder."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from finetune.data.media.audio import RATE
from finetune.data.sample import Layout
from finetune.export._native import lengthened
from finetune.export._vllm.model_class import ServedConfig
from finetune.model.assistant import Assistant
from finetune.model.chat_template import with_media_parts
from finetune.model.composite import MultimodalModel, segments_of

DUMMY_SECONDS = 30  # of sound, with which vLLM tries its memory


def write_served(assistant: Assistant, folder: Path, architecture: str) -> None:
    """Weights, config, tokenizer, chat template and generation config."""
    state = served_state(assistant.model, len(assistant.tokenizer))
    save_torch_state_dict(state, str(folder))
    config = served_config(assistant, "lm_head.weight" not in state)
    config.architectures = [architecture]
    config.save_pretrained(folder)
    assistant.model.language_model.generation_config.save_pretrained(folder)
    tokenizer = copy.deepcopy(assistant.tokenizer)
    tokenizer.chat_template = with_media_parts(tokenizer, assistant.placeholders)
    tokenizer.save_pretrained(folder)


def served_state(composite: MultimodalModel, rows: int) -> dict[str, Tensor]:
    """Weights by the names of `ServedModel` and of vLLM's head: `lm_head.weight`, left out where it is the table, and
    `lm_head.bias`, where there is one. Placeholders have a row in the table, though it is never read.
    """
    causal_lm = composite.causal_lm
    table, head = causal_lm.get_input_embeddings().weight, causal_lm.get_output_embeddings()
    state = {f"model.language_model.{name}": t for name, t in causal_lm.base_model.state_dict().items()}
    (place,) = {name for name, t in state.items() if t.data_ptr() == table.data_ptr()}
    state[place] = lengthened(table, rows)
    if head.weight.data_ptr() != table.data_ptr():
        state["lm_head.weight"] = lengthened(head.weight, rows)
    if head.bias is not None:
        state["lm_head.bias"] = lengthened(head.bias[:, None], rows)[:, 0]
    for part in ("encoders", "projectors"):
        state |= {f"model.{part}.{name}": t for name, t in getattr(composite, part).state_dict().items()}
    return {name: tensor.detach() for name, tensor in state.items()}


def served_config(assistant: Assistant, tied: bool) -> ServedConfig:
    composite = assistant.model
    text = copy.deepcopy(composite.config.text_config)
    text.vocab_size = max(text.vocab_size, len(assistant.tokenizer))
    text.architectures = [type(composite.causal_lm).__name__]
    text.tie_word_embeddings = tied
    if scaling := getattr(text, "logits_scaling", None):  # Granite divides where Cohere, and so vLLM, multiplies
        text.logit_scale = 1 / scaling
    config = ServedConfig(
        text_config=text,
        parts={
            "encoders": {
                name: {"kind": part["kind"], "settings": assistant.encoders[name].settings()}
                for name, part in composite.config.parts["encoders"].items()
            },
            "projectors": composite.config.parts["projectors"],
        },
        tokens={name: placeholder.token for name, placeholder in assistant.placeholders.items()},
        max_source_positions=_tokens_of_sound(assistant),
        tie_word_embeddings=tied,
    )
    config.dtype = composite.causal_lm.dtype
    return config


def _tokens_of_sound(assistant: Assistant) -> int:
    """Placeholders of half a minute of sound; 0 where the model takes none."""
    if "audio" not in assistant.encoders:
        return 0
    layout: Layout = assistant.encoders["audio"].prepare(np.zeros(DUMMY_SECONDS * RATE, np.float32)).layout
    config: Any = assistant.model.config
    return sum(count for _, count in segments_of(config, "audio", layout))
