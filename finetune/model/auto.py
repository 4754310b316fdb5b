"""After `import finetune.model.auto` transformers' Auto classes load what `finetune merge` and `finetune export` write:

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
    """The composite with transformers' conventions: `generate` returns the prompt and the new tokens, and uses the
    folder's generation config. (The composite itself returns new tokens only: its prompts are embeddings.)
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
        """Prompts (B, T), padded on the left, and prepared media -> tokens (B, T + T'), or a `ModelOutput` of them with
        `return_dict_in_generate`. `kwargs`: any of transformers' `generate`.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        kwargs.setdefault("generation_config", self.generation_config)
        output: Any = super().generate(input_ids, mask, features, media, **kwargs)
        new = output if isinstance(output, Tensor) else output.sequences
        prompts = input_ids.repeat_interleave(len(new) // len(input_ids), 0)
        tokens = torch.cat([prompts.to(new.device), new], 1)
        if isinstance(output, Tensor):
            return tokens
        output.sequences = tokens
        return output


for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(MultimodalConfig, MultimodalForConditionalGeneration, exist_ok=True)
AutoProcessor.register(MultimodalConfig, MultimodalProcessor, exist_ok=True)
