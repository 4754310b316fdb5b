"""What was trained, and the merged models that may stand for it: made, written, read back and measured."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from finetune.common.certificate import UNTRAINED, Dtypes, Measures, without_adapter
from finetune.common.errors import ArtifactError
from finetune.common.progress import fresh_memory
from finetune.merging.compare import ComparedSamples, EncodedOnce, distances
from finetune.merging.lora_weights import (
    LoraFile,
    Quantization,
    into_dequantized,
    load_base_on_disk,
    load_on_disk,
    merged_tensors,
    merged_whole,
    unties,
)
from finetune.merging.merged_folder import write_merged, write_merged_base
from finetune.model.adapter import added_weights, load_trained
from finetune.model.base.existing import ExistingModel, modules_beside
from finetune.model.build import Components, build_model, with_base_reloaded
from finetune.model.composite import MultimodalConfig, MultimodalModel
from finetune.model.features import Features
from finetune.model.language_model import decoder_layers, load_language_model
from finetune.model.load import load_exactly, load_merged_base
from finetune.model.run import Run
from finetune.recipe.schema import LanguageModel, Quantize

ROOM = 1.2  # memory that a model takes, over the size of its files
BATCH_ON_DISK = 8  # samples compared at once where each pass reads the LLM from disk


@dataclass
class Trained:
    """What is known of the model that was trained, and of the base, once both are let go. `parts`: the state of
    projectors, fusion and heads; `next_tokens`, `base_next_tokens`: see `ComparedSamples.next_tokens`.
    """

    parts: dict[str, Tensor]
    quantization: Quantization
    next_tokens: list[Tensor]
    base_next_tokens: list[Tensor]
    measures: Measures
    base_measures: Measures

    @property
    def positions(self) -> int:
        return sum(len(row) for row in self.next_tokens)


@dataclass(frozen=True)
class Candidate:
    """`name`: what LoRA is merged into; `quantized`: whether its weights are quantized and dequantized first."""

    name: str
    quantized: bool


@dataclass(frozen=True)
class MergeJob:
    """What every candidate is made from. `run.recipe.adapter`: LoRA's settings as it was trained; `dtype`: of merged
    weights.
    """

    run: Run
    lora: LoraFile | None
    dtype: torch.dtype

    @property
    def llm(self) -> LanguageModel:
        return self.run.recipe.model.language_model

    @property
    def noun(self) -> str:
        return self.run.recipe.model.language_noun

    @property
    def reference(self) -> str:
        llm = f"{'16-bit' if self.llm.quantize == 'none' else self.llm.quantize} {self.noun}"
        return f"the adapter over the {llm}" if self.lora else f"the {llm}"

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        plain, quantize = Candidate(f"the 16-bit {self.noun}", False), self.llm.quantize
        return (plain,) if quantize == "none" else (plain, Candidate(f"the dequantized {quantize} {self.noun}", True))

    @property
    def dtypes(self) -> Dtypes:
        computed = dtype_name(self.run.components.dtype)
        trained = computed if self.llm.quantize == "none" else self.llm.quantize
        return Dtypes(llm=trained, computed=computed, merged=dtype_name(self.dtype))

    @property
    def base_is(self) -> str:
        """What merged models are compared with: with an adapter that was trained, the LLM without it."""
        return without_adapter(self.noun) if self.run.recipe.trains_adapter else UNTRAINED

    def composite(self, components: Components, quantize: Quantize, with_encoders: bool = False) -> MultimodalModel:
        """The model as it was trained, or with its adapter over an LLM that is quantized otherwise."""
        model = self.untrained(components, quantize, with_encoders)
        load_trained(model, self.run.folder.adapter)
        return model

    def untrained(self, components: Components, quantize: Quantize, with_encoders: bool = False) -> MultimodalModel:
        """The same parts with new weights."""
        return build_model(
            replace(components, model=components.model.with_language_model(quantize=quantize)),
            self.run.recipe.adapter,
            seed=self.run.recipe.seed,
            bindings=self.run.bindings,
            with_encoders=with_encoders,
        )

    def measure_trained(self, comparison: ComparedSamples) -> Trained:
        """Load what was trained, and measure it and the base. Encoders that were tuned are then as they will be
        saved.
        """
        components, features = self.run.components, self.run.features
        model, bare = self.untrained(components, self.llm.quantize, bool(components.tuned)), self.base_is != UNTRAINED
        if not bare:
            view = EncodedOnce(features)  # with encoders as they were before they were tuned
            base, base_scores = list(comparison.next_tokens(model, view)), comparison.scores(model, features, view)
        load_trained(model, self.run.folder.adapter)
        view = EncodedOnce(features)
        tokens, scores = list(comparison.next_tokens(model, view)), comparison.scores(model, features, view)
        if bare:
            base = list(comparison.next_tokens(model, view, bare=True))
            base_scores = comparison.scores(model, features, view, bare=True)
        trained = Trained(
            parts={name: tensor.detach().cpu().clone() for name, tensor in added_weights(model).items()},
            quantization=Quantization.of(model.causal_lm),
            next_tokens=tokens,
            base_next_tokens=base,
            measures=distances(tokens, tokens, base, scores),
            base_measures=distances(base, tokens, base, base_scores),
        )
        for tuned in components.tuned.values():
            if tuned.lora is not None:
                tuned.lora.merge_and_unload()
        return trained

    def write(self, place: Path, scratch: Path, trained: Trained, quantized: bool) -> str:
        """Write a candidate's folder; says how it was merged. `quantized`: see `Candidate`."""
        fresh_memory()
        base, lora, quantization = self.run.components.base, self.lora, trained.quantization if quantized else None
        if base is not None:
            base.release_weights()
        # 16-bit weights needn't fit where 4-bit ones do.
        on_cpu = replace(self.run.components, device=torch.device("cpu"))
        if lora is not None and not lora.by_module:
            quantize = self.llm.quantize if quantized else "none"
            components = on_cpu if base is None else with_base_reloaded(on_cpu, quantize, on_cpu.device)
            llm = self.composite(components, quantize).language_model
            llm = into_dequantized(llm, self.dtype) if quantized else merged_whole(llm).to(self.dtype)
            drawn = f"{lora.config.init_lora_weights!r} draws at random for the whole {self.noun}"
            method = f"all at once, in memory: {drawn}"
            lora, quantization = None, None
        elif base is not None:
            llm = load_base_on_disk(base, scratch)
            method = "module by module, from the base's files"
        elif self.llm.name.endswith(".gguf"):
            plain = self.llm.model_copy(update={"quantize": "none", "attention": "auto"})
            llm = load_language_model(plain, on_cpu.dtype, on_cpu.device)
            method = "module by module, from memory: a .gguf is read whole"
        else:
            llm = load_on_disk(self.llm, on_cpu.dtype, scratch)
            method = "module by module, from the LLM's files"
        refuse_without_room(place.parent, sum(p.numel() for p in llm.parameters()) * self.dtype.itemsize)
        prepare_config(llm.config, self.dtype, untie=base is None and unties(llm, lora))
        write = write_merged if base is None else write_merged_base
        write(place, llm, merged_tensors(llm, self.dtype, lora, quantization), trained.parts, self.run)
        return method

    def measure(self, place: Path, scratch: Path, comparison: ComparedSamples, trained: Trained) -> Measures:
        """The measures of a candidate, read back from disk with its own encoders."""
        fresh_memory()
        if self.run.components.base is not None:
            model, on_disk = read_base_back(place, self.run.components.device, scratch)
        else:
            model, on_disk = read_back(place, self.run.components.device, scratch)
        model.language_model.generation_config = GenerationConfig.from_pretrained(place)
        features = Features(model.encoder_parts, None, self.run.recipe.media)
        view = EncodedOnce(features)
        tokens = comparison.next_tokens(model, view, batch=BATCH_ON_DISK if on_disk else 1)
        measures = distances(tokens, trained.next_tokens, trained.base_next_tokens)
        if on_disk:
            size = sum(path.stat().st_size for path in place.glob("*.safetensors")) / 2**30
            reason = f"memory has no room for its {size:.1f} GiB, and each token written would read them all"
            return measures.model_copy(update={"not_scored": reason})
        return measures.model_copy(update={"scores": comparison.scores(model, features, view)})


def prepare_config(config: Any, dtype: torch.dtype, untie: bool) -> None:
    """The LLM's config as that of the merged LLM. `untie`: its head is no longer its embeddings."""
    if untie:
        config.tie_word_embeddings = False
    for attribute in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, attribute):
            delattr(config, attribute)
    config.dtype = dtype


def refuse_without_room(folder: Path, needed: int) -> None:
    """Raises ArtifactError where the disk has no room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ArtifactError(
            f"{folder.parent}: {free / 2**30:.1f} GiB are free, a merged model takes {needed / 2**30:.1f}; two are "
            "written, and one is kept. Make room, and merge again"
        )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_back(folder: Path, device: torch.device, scratch: Path) -> tuple[MultimodalModel, bool]:
    """The model of a merged folder, and whether the layers of its LLM are left on disk, because neither the accelerator
    nor memory has room for it: then each forward reads them once.
    """
    place = place_for(folder, device)
    if place is not None:
        options = {"device_map": {"": place}} if place.type == "cuda" else {}
        return load_exactly(MultimodalModel, folder, **options).eval(), False
    config = MultimodalConfig.from_pretrained(folder)
    with torch.device("meta"):
        skeleton = MultimodalModel(config)
    places = layers_on_disk(skeleton, decoder_layers(skeleton.causal_lm), device)
    model = load_exactly(MultimodalModel, folder, device_map=places, offload_folder=str(scratch))
    return model.eval(), True


def read_base_back(folder: Path, device: torch.device, scratch: Path) -> tuple[MultimodalModel, bool]:
    """As `read_back`, of a merged base."""
    place = place_for(folder, device)
    if place is not None:
        return load_merged_base(folder, place).model, False

    def leave_on_disk(base: ExistingModel) -> None:
        layers = decoder_layers(base.skeleton, base.skeleton.get_decoder())
        base.model = load_base_on_disk(base, scratch, layers_on_disk(base.skeleton, layers, device))

    return load_merged_base(folder, device, leave_on_disk).model, True


def place_for(folder: Path, device: torch.device) -> torch.device | None:
    """Where there is room for a folder's weights: on the accelerator, or in memory; None where there is none."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if device.type == "cuda" and ROOM * size < torch.cuda.mem_get_info(device)[0]:
        return device
    return torch.device("cpu") if ROOM * size < psutil.virtual_memory().available else None


def layers_on_disk(model: nn.Module, layers: nn.Module, device: torch.device) -> dict[str, str]:
    """{module: where it is}: a decoder's layers on disk, all others on the device."""
    above = next(name for name, module in model.named_modules() if module is layers)
    places = dict.fromkeys(modules_beside(model, layers), str(device))  # safetensors takes the name, not torch's type
    return places | {f"{above}.{number}": "disk" for number, _ in enumerate(layers.children())}
