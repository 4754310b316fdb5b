"""The LLM of a composite, or of a base, as a folder of its own for a class of transformers that reads text, and its
LoRA as a plain adapter of PEFT over that.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from finetune.common.run_folder import write_json
from finetune.model.composite import MultimodalModel
from finetune.model.module_names import is_lora

SHARD_BYTES = 2**31
ADAPTER = "base_model.model."  # before the names of modules in an adapter's file


def text_class(config: Any) -> Any:
    """The class of transformers for an LLM of this config that reads text alone; None where there is none."""
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config.get_text_config()), None)


class LanguageModelAlone:
    """`model`: an LLM that reads plainly (see `MultimodalModel.reads_plainly`), with or without LoRA."""

    def __init__(self, model: MultimodalModel) -> None:
        causal_lm = self.causal_lm = model.causal_lm
        self.language_model, self.is_base = model.language_model, model.composition.base
        self.model_class = text_class(causal_lm.config) if self.is_base else type(causal_lm)
        names = {id(module): name for name, module in causal_lm.named_modules()}
        self.decoder, self.head = names[id(model.decoder)], names[id(causal_lm.get_output_embeddings())]
        self.tied = causal_lm.get_output_embeddings().weight is causal_lm.get_input_embeddings().weight

    def name_of(self, name: str) -> str | None:
        """A module's or parameter's name in the LLM alone; None for what is beside the LLM."""
        if not self.is_base:
            return name
        for old, new in ((self.decoder, self.model_class.base_model_prefix), (self.head, "lm_head")):
            if name.startswith(f"{old}."):
                return new + name.removeprefix(old)
        return None

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """One after another, without LoRA; those of 4 or 8 bits written out, in the dtype that the LLM computes in."""
        for place, module in self.causal_lm.named_modules():
            lasting = {
                key: one for key, one in module._buffers.items() if key not in module._non_persistent_buffers_set
            }
            for key, stored in [*module._parameters.items(), *lasting.items()]:
                own = f"{place}.{key}".removeprefix(".")
                name = self.name_of(own.replace(".base_layer.", "."))
                if stored is None or name is None or is_lora(own) or (self.tied and own == f"{self.head}.weight"):
                    continue
                tensor = stored
                if isinstance(stored, nn.Parameter):
                    tensor = dequantize_bnb_weight(stored, getattr(module, "state", None))
                yield (
                    name,
                    (stored if tensor is stored else tensor.to(self.causal_lm.dtype)).detach().cpu().contiguous(),
                )

    def write(self, tokenizer: Any, folder: Path) -> None:
        """The folder that `vllm serve` takes."""
        folder.mkdir(parents=True)
        index: dict[str, str] = {}
        shard: dict[str, Tensor] = {}

        def close() -> None:
            file = f"model-{len(set(index.values())):05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            index.update(dict.fromkeys(shard, file))
            shard.clear()

        for name, tensor in self.weights():
            shard[name] = tensor
            if sum(one.nbytes for one in shard.values()) > SHARD_BYTES:
                close()
        close()
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
        config = self.causal_lm.config.get_text_config().to_dict()
        config |= {"architectures": [self.model_class.__name__], "tie_word_embeddings": self.tied}
        config["dtype"] = str(self.causal_lm.dtype).removeprefix("torch.")
        config.pop("quantization_config", None)
        write_json(folder / "config.json", config)
        tokenizer.save_pretrained(folder)

    @property
    def lora(self) -> dict[str, Tensor]:
        """Its LoRA weights, by the names that PEFT gives them in a file."""
        state = get_peft_model_state_dict(self.language_model, save_embedding_layers=False)
        names = {name: self.name_of(name.removeprefix(ADAPTER)) for name in state}
        return {f"{ADAPTER}{new}": state[old] for old, new in names.items() if new}

    @property
    def lora_targets(self) -> list[str]:
        """Last names of the modules that have LoRA."""
        return sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in self.lora})

    def write_adapter(self, folder: Path) -> None:
        """Its LoRA as it is now."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.lora.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy.copy(self.language_model.peft_config["default"])
        config.target_modules = set(self.lora_targets)
        config.rank_pattern, config.alpha_pattern, config.base_model_name_or_path = {}, {}, None
        config.init_lora_weights = config.inference_mode = True
        config.save_pretrained(str(folder))
