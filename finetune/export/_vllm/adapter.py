"""Splits a merged LLM again: into a base, which vLLM serves with the projectors in it, and a LoRA on top."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from finetune.common.run_folder import read_json, write_json
from finetune.export._language_model import NAME


def subtract_adapter(causal_lm: Any, adapter: Path) -> Any:
    """The merged LLM less what the adapter added: whichever base the merge chose, without loading it."""
    from peft import PeftConfig, PeftModel
    from peft.tuners.lora import LoraLayer

    config: Any = PeftConfig.from_pretrained(str(adapter))
    config.init_lora_weights = True  # PiSSA's would change the base
    wrapped = PeftModel.from_pretrained(causal_lm, str(adapter), config=config)
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(-1.0)
    return wrapped.merge_and_unload(safe_merge=True)


def write_adapter(causal_lm: Any, adapter: Path, folder: Path) -> None:
    """Write the adapter with the module names of `ServedModel`."""
    state = load_file(adapter / "adapter_model.safetensors")
    old, new = f"base_model.model.{causal_lm.base_model_prefix}.", f"base_model.model.{NAME}."
    folder.mkdir()
    save_file(
        {name.replace(old, new, 1): tensor for name, tensor in state.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config = read_json(adapter / "adapter_config.json") | {"base_model_name_or_path": None}
    write_json(folder / "adapter_config.json", config)
