"""What was trained, and the merged models that may stand for it: made, written, read back and measured."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from finetune.common.errors import ArtifactError
from finetune.common.progress import fresh_memory
from finetune.data.media import Limits
from finetune.merging.compare import Compared, distances, own_look
from finetune.merging.lora_weights import (
    LoraFile,
    into_dequantized,
    into_plain,
    load_on_disk,
    merged_tensors,
    quantized_modules,
    unties,
    weights_in,
    write_merged,
)
from finetune.model import adapter
from finetune.model.asks import Ask
from finetune.model.build import Parts, build_model
from finetune.model.composite import MultimodalConfig, MultimodalModel
from finetune.model.features import Features
from finetune.model.language_model import decoder_layers, load_language_model

ROOM = 1.2  # memory that a model takes, over the size of its files
TOGETHER = 8  # rows compared at once where each pass reads the LLM from disk


@dataclass
class Trained:
    """What is known of the model that was trained, and of its LLM without the adapter, once both are let go. `own`: the
    state of projectors, fusion and heads; `quantization`: transformers' config of it; `quantized`: modules of the LLM
    that it is about; `tokens`, `base`: of each row, see `Compared.next_tokens`.
    """

    own: dict[str, Tensor]
    quantization: Any
    quantized: frozenset[str]
    tokens: list[Tensor]
    base: list[Tensor]
    measures: dict[str, Any]
    base_measures: dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What every candidate is made from. `llm`: the recipe's `model.llm`; `dtype`: of merged weights."""

    adapter: Path
    lora: LoraFile | None
    llm: Mapping[str, Any]
    adapter_options: Mapping[str, Any] | None
    seed: int
    asks: Mapping[str, Ask]
    parts: Parts
    limits: Limits
    dtype: torch.dtype

    @property
    def quantize(self) -> str:
        return self.llm["quantize"]

    @property
    def reference(self) -> str:
        llm = "16-bit" if self.quantize == "none" else self.quantize
        return f"the adapter over the {llm} LLM" if self.lora else f"the {llm} LLM"

    def candidates(self) -> list[str]:
        """What LoRA is merged into; the second one's weights are quantized first."""
        quantized = [] if self.quantize == "none" else [f"the dequantized {self.quantize} LLM"]
        return ["the 16-bit LLM", *quantized]

    def dtypes(self) -> dict[str, str]:
        computed = named(self.parts.dtype)
        trained = computed if self.quantize == "none" else self.quantize
        return {"llm": trained, "computed": computed, "merged": named(self.dtype)}

    def composite(self, parts: Parts, quantize: str, with_encoders: bool = False) -> MultimodalModel:
        """The model as it was trained, or with its adapter over an LLM that is quantized otherwise."""
        model = build_model(
            parts,
            llm={**self.llm, "quantize": quantize},
            adapter_options=self.adapter_options,
            seed=self.seed,
            with_encoders=with_encoders,
            asks=self.asks,
        )
        adapter.load_trained(model, self.adapter)
        return model

    def measured(self, compared: Compared, features: Features) -> Trained:
        """Load what was trained, and measure it with its adapter and without. Encoders that were tuned are then as they
        will be saved.
        """
        model, look = self.composite(self.parts, self.quantize, bool(self.parts.tuned)), own_look(features)
        tokens = list(compared.next_tokens(model, look))
        base = list(compared.next_tokens(model, look, bare=True))
        scores, base_scores = ({} for _ in range(2))
        if compared.scored_entries:
            scores = {"scores": compared.scores(model, features, look)}
            base_scores = {"scores": compared.scores(model, features, look, bare=True)}
        trained = Trained(
            {
                f"{group}.{name}": tensor.detach().cpu().clone()
                for group in ("projectors", "fusion", "heads")
                for name, tensor in getattr(model, group).state_dict().items()
            },
            getattr(model.causal_lm.config, "quantization_config", None),
            quantized_modules(model.causal_lm),
            tokens,
            base,
            distances(tokens, tokens, base) | scores,
            distances(base, tokens, base) | base_scores,
        )
        for tuned in self.parts.tuned.values():
            if tuned.lora is not None:
                tuned.lora.merge_and_unload()
        return trained

    def write(self, place: Path, scratch: Path, trained: Trained, *, quantized: bool) -> str:
        """Write a candidate's folder; says how it was merged."""
        fresh_memory()
        on_cpu = replace(self.parts, device=torch.device("cpu"))  # 16-bit weights needn't fit where 4-bit ones do
        how = "module by module, from the LLM's files"
        lora = self.lora
        if lora is not None and not lora.by_module:
            llm = self.composite(on_cpu, self.quantize if quantized else "none").language_model
            llm = into_dequantized(llm, self.dtype) if quantized else into_plain(llm, self.dtype)
            how = f"all at once, in memory: {lora.config.init_lora_weights!r} draws by chance for the whole LLM"
            lora, quantized = None, False
        elif self.llm["name"].endswith(".gguf"):
            keys = ("name", "revision", "trust_remote_code")
            llm = load_language_model(**{key: self.llm[key] for key in keys}, dtype=on_cpu.dtype, device=on_cpu.device)
            how = "module by module, from memory: a .gguf is read whole"
        else:
            llm = load_on_disk(self.llm, on_cpu.dtype, scratch)
        refuse_without_room(place.parent, weights_in(llm) * self.dtype.itemsize)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            if quantized:
                return merged_tensors(llm, self.dtype, lora, trained.quantization, trained.quantized)
            return merged_tensors(llm, self.dtype, lora)

        write_merged(
            place,
            llm,
            tensors,
            self.dtype,
            parts=self.parts,
            own=trained.own,
            asks=self.asks,
            limits=self.limits,
            untie=unties(llm, lora),
        )
        return how


def measured_on_disk(
    place: Path, scratch: Path, compared: Compared, trained: Trained, parts: Parts, limits: Limits
) -> dict[str, Any]:
    """The measures of a candidate as it stands on disk: read back, it sees with its own encoders."""
    fresh_memory()
    model, on_disk = read_back(place, parts.device, scratch)
    model.language_model.generation_config = GenerationConfig.from_pretrained(place)
    kinds = model.config.parts["encoders"]
    features = Features({name: (kinds[name]["kind"], e) for name, e in model.encoder_parts.items()}, None, limits)
    look = own_look(features)
    tokens = compared.next_tokens(model, look, together=TOGETHER if on_disk else 1)
    found: dict[str, Any] = distances(tokens, trained.tokens, trained.base)
    if on_disk:
        size = sum(path.stat().st_size for path in place.glob("*.safetensors")) / 2**30
        found["not_scored"] = f"memory has no room for its {size:.1f} GiB, and each token written would read them all"
    elif compared.scored_entries:
        found["scores"] = compared.scores(model, features, look)
    return found


def refuse_without_room(folder: Path, needed: int) -> None:
    """Raises ArtifactError where the disk has no room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ArtifactError(
            f"{folder.parent}: {free / 2**30:.1f} GiB are free, a merged model takes {needed / 2**30:.1f}; two are "
            "written, and one is kept. Make room, and merge again"
        )


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_back(folder: Path, device: torch.device, scratch: Path) -> tuple[MultimodalModel, bool]:
    """The model of a merged folder, and whether the layers of its LLM are left on disk, because neither the accelerator
    nor memory has room for it: then each forward reads them once.
    """
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if device.type == "cuda" and ROOM * size < torch.cuda.mem_get_info(device)[0]:
        return loaded(folder, device_map={"": device}), False
    if ROOM * size < psutil.virtual_memory().available:
        return loaded(folder), False
    config = MultimodalConfig.from_pretrained(folder)
    with torch.device("meta"):
        skeleton = MultimodalModel(config)
    layers = decoder_layers(skeleton.causal_lm)
    above = next(name for name, module in skeleton.named_modules() if module is layers)
    places = dict.fromkeys(rest_of(skeleton, above), str(device))  # safetensors takes the name, not torch's device
    places |= {f"{above}.{number}": "disk" for number in range(len(layers))}
    return loaded(folder, device_map=places, offload_folder=str(scratch)), True


def rest_of(module: nn.Module, without: str, name: str = "") -> list[str]:
    """The outermost modules that don't hold the module `without`."""
    if name == without:
        return []
    if not f"{without}.".startswith(f"{name}." if name else ""):
        return [name]
    inner = [rest_of(child, without, f"{name}.{key}".lstrip(".")) for key, child in module.named_children()]
    return [found for names in inner for found in names]


def loaded(folder: Path, **how: Any) -> MultimodalModel:
    """Raises ArtifactError where weights are missing, or are too many."""
    read: Any = MultimodalModel.from_pretrained(folder, dtype="auto", output_loading_info=True, **how)
    model, report = read
    wrong = {
        key: sorted(report[key])[:3] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]
    }
    if wrong:
        raise ArtifactError(f"{folder}: weights don't fit the config: {wrong}")
    return model.eval()
