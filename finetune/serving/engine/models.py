"""The models to be served, by name. Adapters over the same LLM hold its weights in memory once."""

import copy
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.common import hub
from finetune.common.progress import quiet_libraries
from finetune.common.run_folder import read_json
from finetune.model.assistant import Assistant
from finetune.model.build import Parts, load_llm
from finetune.model.language_model import default_device
from finetune.model.load import load, load_adapter

LEAVE_THE_BASE_ALONE = (True, False, "gaussian", "orthogonal")  # ways to begin a LoRA; others change what it is put on


def load_models(sources: Mapping[str, Path | str], device: torch.device | None = None) -> dict[str, Assistant]:
    """{name: run, merged folder, adapter folder or Hub id} -> {name: a model}.

    Adapters that name the same LLM, equally quantized, are put on one copy of its weights; their projectors, heads and
    tokenizers are their own. Raises what `finetune.load` raises.
    """
    quiet_libraries()
    device = device or default_device()
    folders = {name: _folder(str(source)) for name, source in sources.items()}
    bases = {name: key for name, folder in folders.items() if (key := _base_of(folder))}
    shared = {key: _Base(device) for key, count in Counter(bases.values()).items() if count > 1}
    return {
        name: shared[bases[name]].under(folder) if bases.get(name) in shared else load(folder, device)
        for name, folder in folders.items()
    }


def _folder(source: str) -> Path:
    """Where `load` would read."""
    path = Path(source)
    if not path.exists() and hub.is_repository(source):
        return hub.fetched(source)
    found = (path / part for part in ("merged", "adapter") if (path / part).is_dir())
    return next(found, path)


def _base_of(folder: Path) -> str | None:
    """What tells an adapter's LLM apart; None where its weights can't be shared."""
    if not (folder / "multimodal.json").is_file():
        return None
    llm = read_json(folder / "multimodal.json").get("language_model", {})
    path = folder / "adapter_config.json"
    begins = read_json(path).get("init_lora_weights", True) if path.is_file() else True
    # bitsandbytes moves 8-bit weights out of their parameters when they are first used.
    if llm.get("quantize") == "int8" or begins not in LEAVE_THE_BASE_ALONE:
        return None
    return json.dumps(llm, sort_keys=True)


class _Base:
    """An LLM as it came, and the frozen encoders that adapters over it have in common."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.language_model: Any = None
        self.encoders: dict[tuple[str, str], Any] = {}

    def under(self, folder: Path) -> Assistant:
        """The adapter folder's model, on these weights."""
        return load_adapter(folder, self.device, shared=self._shared)

    def _shared(self, parts: Parts, llm: Mapping[str, Any]) -> Any:
        for name, (kind, encoder) in parts.encoders.items():
            if name not in parts.tuned:
                parts.encoders[name] = (kind, self.encoders.setdefault((kind, encoder.fingerprint), encoder))
        if self.language_model is None:
            self.language_model = load_llm(parts, llm)
        return same_weights(self.language_model)


def same_weights(module: Any) -> Any:
    """A module like this one, of the same parameters and buffers: what is put on it, the other doesn't have."""
    own = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in own})
