"""After `import finetune.model.auto` transformers' Auto classes load what `finetune merge` and `finetune export` wrote:

import finetune.model.auto
from transformers import AutoModelForImageTextToText, AutoProcessor

processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
tokens = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    GenerationMixin,
)

from finetune.model.composite import MultimodalConfig, MultimodalModel
from finetune.model.processor import MultimodalProcessor


class MultimodalForConditionalGeneration(MultimodalModel, GenerationMixin):
    """The composite with the manners of transformers: `generate` gives the prompt and what follows, by the generation
    config that stands in the folder. (The composite alone gives new tokens only: its prompts are embeddings.)
    """

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        features: Mapping[str, Sequence[Tensor]] | None = None,
        media: Mapping[str, Sequence[Tensor]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Prompts (B, T), padded on the left, and prepared media -> tokens (B, T + T'), or what
        `return_dict_in_generate` asks for. `kwargs`: any of transformers' `generate`.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        kwargs.setdefault("generation_config", self.generation_config)
        found: Any = super().generate(input_ids, mask, features, media, **kwargs)
        new = found if isinstance(found, Tensor) else found.sequences
        prompts = input_ids.repeat_interleave(len(new) // len(input_ids), 0)
        tokens = torch.cat([prompts.to(new.device), new], 1)
        if isinstance(found, Tensor):
            return tokens
        found.sequences = tokens
        return found


for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(MultimodalConfig, MultimodalForConditionalGeneration, exist_ok=True)
AutoProcessor.register(MultimodalConfig, MultimodalProcessor, exist_ok=True)
