"""The models to serve, by name. Adapters on the same LLM share one copy of its weights."""

import copy
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.common.progress import quiet_libraries
from finetune.common.registry import kind_of
from finetune.model.adapter import saved_adapter
from finetune.model.assistant import Assistant
from finetune.model.build import Components, load_llm
from finetune.model.encoders import Encoder
from finetune.model.language_model import default_device
from finetune.model.load import load_adapter, load_folder, model_folder
from finetune.model.manifest import MANIFEST, AdapterManifest
from finetune.recipe.schema import Base

# LoRA initialisations that leave the base weights unchanged; others (PiSSA, ...) modify them.
BASE_UNCHANGED = ("default", "gaussian", "orthogonal")


def load_models(sources: Mapping[str, Path | str]) -> dict[str, Assistant]:
    """{name: run, merged folder, adapter folder or Hub id} -> {name: model}.

    Adapters on the same LLM, equally quantized, share its weights; projectors, heads and tokenizers are separate.
    Raises as `finetune.load`.
    """
    quiet_libraries()
    device = default_device()
    folders = {name: model_folder(source) for name, source in sources.items()}
    bases = {name: key for name, folder in folders.items() if (key := _base_of(folder))}
    shared = {key: _SharedBase() for key, count in Counter(bases.values()).items() if count > 1}
    return {
        name: load_adapter(folder, device, shared_llm=shared[bases[name]].language_model)
        if bases.get(name) in shared
        else load_folder(folder, device)
        for name, folder in folders.items()
    }


def _base_of(folder: Path) -> str | None:
    """A key of an adapter's LLM and its quantization; None if its weights can't be shared."""
    if not (folder / MANIFEST).is_file():
        return None
    llm, adapter = AdapterManifest.read(folder).model.language_model, saved_adapter(folder)
    # bitsandbytes moves 8-bit weights out of their parameters at first use.
    # Adapters over a base may have changed its encoders and projectors.
    if (
        isinstance(llm, Base)
        or llm.quantize == "int8"
        or (adapter is not None and adapter.initialization not in BASE_UNCHANGED)
    ):
        return None
    return llm.model_dump_json()


class _SharedBase:
    """A frozen LLM, and the frozen encoders that adapters on it have in common."""

    def __init__(self) -> None:
        self._language_model: Any = None
        self._encoders: dict[tuple[str, str], Encoder] = {}

    def language_model(self, components: Components) -> Any:
        """A module of its own, for PEFT to modify, on the shared weights. `components` get the shared encoders."""
        for name, encoder in components.encoders.items():
            if name not in components.tuned:
                key = (kind_of(encoder), encoder.fingerprint)
                components.encoders[name] = self._encoders.setdefault(key, encoder)
        if self._language_model is None:
            self._language_model = load_llm(components)
        tensors = [*self._language_model.parameters(), *self._language_model.buffers()]
        return copy.deepcopy(self._language_model, {id(tensor): tensor for tensor in tensors})
