"""Writes a composite as `ServedModel`, the kit's own class for vLLM."""

from pathlib import Path

import numpy as np
from huggingface_hub import save_torch_state_dict

from finetune.data.media.audio import RATE
from finetune.export._language_model import language_model_state, media_tokenizer, text_config
from finetune.export._vllm.model_class import ServedConfig
from finetune.model.assistant import Assistant
from finetune.model.composition import Composition, SavedEncoder

DUMMY_SECONDS = 30  # of sound, with which vLLM measures its memory


def write_served(assistant: Assistant, folder: Path, architecture: str) -> None:
    """Write weights, config, tokenizer with chat template, and generation config."""
    composite = assistant.model
    state, tied = language_model_state(composite.causal_lm, len(assistant.tokenizer))
    if tied:
        del state["lm_head.weight"]
    for part, modules in (("encoders", composite.encoders), ("projectors", composite.projectors)):
        state |= {f"model.{part}.{name}": tensor.detach() for name, tensor in modules.state_dict().items()}
    save_torch_state_dict(state, str(folder))
    config = served_config(assistant, tied)
    config.architectures = [architecture]
    config.save_pretrained(folder)
    composite.language_model.generation_config.save_pretrained(folder)
    media_tokenizer(assistant).save_pretrained(folder)


def served_config(assistant: Assistant, tied: bool) -> ServedConfig:
    composite = assistant.model
    text = text_config(assistant)
    text.tie_word_embeddings = tied
    if scaling := getattr(text, "logits_scaling", None):  # Granite divides where Cohere, and so vLLM, multiplies
        text.logit_scale = 1 / scaling
    config = ServedConfig(
        text_config=text,
        parts=Composition(
            encoders={
                name: SavedEncoder(kind=saved.kind, settings=assistant.encoders[name].settings())
                for name, saved in composite.composition.encoders.items()
            },
            projectors=composite.composition.projectors,
        ).model_dump(mode="json"),
        tokens={name: placeholder.token for name, placeholder in assistant.placeholders.items()},
        max_source_positions=_tokens_of_sound(assistant),
        tie_word_embeddings=tied,
    )
    config.dtype = composite.causal_lm.dtype
    return config


def _tokens_of_sound(assistant: Assistant) -> int:
    """Placeholders of half a minute of sound; 0 if the model takes none."""
    if "audio" not in assistant.encoders:
        return 0
    layout = assistant.encoders["audio"].prepare(np.zeros(DUMMY_SECONDS * RATE, np.float32)).layout
    return sum(segment.tokens for segment in assistant.model.composition.placement.segments("audio", layout))
