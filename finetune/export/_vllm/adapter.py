"""The merged LLM taken apart again: a base, which vLLM serves with the projectors in it, and a LoRA over it."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def take_out(causal_lm: Any, adapter: Path) -> Any:
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
    """The adapter by the names that `ServedModel` has."""
    before = f"base_model.model.{causal_lm.base_model_prefix}."
    state = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace(before, "base_model.model.model.language_model.", 1): t for name, t in state.items()}
    folder.mkdir()
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = None
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
