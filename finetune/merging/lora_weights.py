"""LoRA into the weights of an LLM, module by module, from the LLM's files into shards of a merged folder: no more is in
memory than one shard and one module.

transformers reads the LLM with all of its weights left on disk, so renamed and fused weights come as the model has
them; bitsandbytes quantizes and dequantizes each weight as loading does; PEFT merges each module.
"""

import copy
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import finetune.model.eager_bitsandbytes  # noqa: F401

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.bitsandbytes import (
    dequantize_and_replace,
    replace_with_bnb_linear,
)
from transformers.pytorch_utils import Conv1D

from finetune.common.errors import ArtifactError, MergeRefused
from finetune.common.hub import loading
from finetune.common.progress import trim_memory
from finetune.common.run_folder import read_json
from finetune.model import module_names
from finetune.model.base.existing import ExistingModel
from finetune.recipe.schema import LanguageModel

GARBAGE_BYTES = 2**25
LEAF = "leaf"
# Initialisations that leave the base alone, or change each weight by a rule without chance. Others are drawn anew for
# the whole LLM, in its order.
BY_MODULE = (True, False, "gaussian", "orthogonal", "olora", "pissa")
CHANGES_BASE = ("olora", "pissa")


class LoraFile:
    """The LoRA of an adapter folder. Raises ArtifactError where it is missing or damaged.

    `tensors`: {module: its tensors, under the names that they have for a model that is only this one}.
    """

    def __init__(self, folder: Path) -> None:
        read_json(folder / "adapter_config.json")
        self.config: Any = LoraConfig.from_pretrained(str(folder))
        self.path = folder / "adapter_model.safetensors"
        self.tensors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in module_names.tensors(self.path).items():
            module = module_names.module_of(name)
            self.tensors.setdefault(module, {})[name.replace(f".{module}.", f".{LEAF}.", 1)] = tensor

    @property
    def by_module(self) -> bool:
        """Whether merging one module after the other gives what merging all at once gives."""
        return self.config.init_lora_weights in BY_MODULE

    def modules_of(self, llm: nn.Module) -> dict[str, str]:
        """{module as the files call it: as the LLM does}. Raises ArtifactError where it has no such module."""
        holding = [name for name, module in llm.named_modules() if any(True for _ in module.parameters(recurse=False))]
        return module_names.matched(str(self.path), list(self.tensors), holding, llm)

    def config_of(self, module: str) -> Any:
        """Of one module, as the files call it: LoRA on a base's encoders has a rank of its own."""
        patterns: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
        rank = self.config.rank_pattern.get(module, self.config.r)
        alpha = self.config.alpha_pattern.get(module, self.config.lora_alpha)
        return replace(self.config, r=rank, lora_alpha=alpha, **patterns)


def load_on_disk(llm: LanguageModel, dtype: torch.dtype, scratch: Path) -> Any:
    """The LLM with its weights left in its files; those to be converted lie in `scratch`. Raises ModelError."""
    options: dict[str, Any] = {"trust_remote_code": llm.trust_remote_code, "revision": llm.revision}
    with loading(f"LLM {llm.name!r}", llm.name) as local_only:
        options["local_files_only"] = local_only
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(llm.name, **options)
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=llm.trust_remote_code)
        options |= {"device_map": on_disk(skeleton), "offload_folder": str(scratch), "use_safetensors": True}
        options["adapter_kwargs"] = {"local_files_only": local_only}
        return AutoModelForCausalLM.from_pretrained(llm.name, dtype=dtype, **options).eval()


def load_base_on_disk(base: ExistingModel, scratch: Path, places: Mapping[str, str] | None = None) -> Any:
    """As `load_on_disk`, of an existing model. `places`: {module: device, or "disk"}; None: all on disk."""
    settings = base.settings
    with loading(f"base {settings.name!r}", settings.name) as local_only:
        return base.model_class.from_pretrained(
            settings.name,
            revision=settings.revision,
            dtype=base.dtype,
            device_map=dict(places or on_disk(base.skeleton)),
            offload_folder=str(scratch),
            use_safetensors=True,
            local_files_only=local_only,
            adapter_kwargs={"local_files_only": local_only},
        ).eval()


def on_disk(skeleton: nn.Module) -> dict[str, str]:
    """{module: "disk"}, but for the smallest: accelerate refuses to leave all of a model there."""
    sizes = {block: sum(p.numel() for p in skeleton.get_submodule(block).parameters()) for block in blocks(skeleton)}
    return dict.fromkeys(sizes, "disk") | {min(sizes, key=lambda block: sizes[block]): "cpu"}


def blocks(module: nn.Module, name: str = "") -> list[str]:
    """Names of the outermost modules that have weights or saved buffers of their own."""
    if any("." not in key for key in module.state_dict()):
        return [name]
    children = ((f"{name}.{child}".lstrip("."), inner) for child, inner in module.named_children())
    return [block for path, inner in children for block in blocks(inner, path)]


@dataclass(frozen=True)
class Quantization:
    """`config`: transformers'; `modules`: names, without PEFT's, of the modules that bitsandbytes holds."""

    config: Any
    modules: frozenset[str]

    @classmethod
    def of(cls, causal_lm: nn.Module) -> "Quantization":
        from bitsandbytes.nn import Linear4bit, Linear8bitLt

        names = frozenset(
            name.removesuffix(".base_layer")
            for name, module in causal_lm.named_modules()
            if isinstance(module, Linear4bit | Linear8bitLt)
        )
        return cls(getattr(causal_lm.config, "quantization_config", None), names)


def merged_tensors(
    llm: Any,
    dtype: torch.dtype,
    lora: LoraFile | None = None,
    quantization: Quantization | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the LLM's state, LoRA merged, in `dtype`, on the CPU; tied weights once.

    `llm`: in memory, or by `load_on_disk`. `quantization`: its modules are quantized and dequantized before LoRA is
    merged. Raises ArtifactError where a tensor of the adapter has no module.
    """
    names, tied = llm.state_dict().keys(), untied(llm, lora)
    # {module: its name in the adapter's file}: transformers may have renamed it since.
    targets = {name: saved for saved, name in lora.modules_of(llm).items()} if lora else {}
    garbage = 0  # bytes of weights in PEFT's layers, which refer to each other and so outlive their use
    for name, module in llm.named_modules():
        if garbage > GARBAGE_BYTES:
            gc.collect()
            garbage = 0
        with align_module_device(module, torch.device("cpu")):
            weights: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
            quantized = quantization is not None and name in quantization.modules
            if name in targets or quantized:
                state = lora.tensors[targets[name]] if lora and name in targets else {}
                config = quantization.config if quantization is not None and quantized else None
                own = lora.config_of(targets[name]) if lora and name in targets else None
                weights = merged_module(name, module, weights, dtype, state, own, config)
                garbage += sum(tensor.nbytes for tensor in weights.values())
                trim_memory()
            for inside, tensor in {**weights, **dict(module.named_buffers(recurse=False))}.items():
                full = f"{name}.{inside}".lstrip(".")
                if full in names and full not in tied:
                    yield full, (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().contiguous()
    for full, source in llm.all_tied_weights_keys.items():
        if full not in tied:  # the embeddings changed, the head that they were tied to didn't
            yield full, weight_of(llm, source).to(dtype).contiguous()


def untied(llm: Any, lora: LoraFile | None) -> set[str]:
    """Names of weights that are still another's, and not written: LoRA on embeddings leaves a tied head as it was."""
    targets = set(lora.modules_of(llm).values()) if lora else set()
    return {name for name, source in llm.all_tied_weights_keys.items() if source.rpartition(".")[0] not in targets}


def unties(llm: Any, lora: LoraFile | None) -> bool:
    return len(untied(llm, lora)) < len(llm.all_tied_weights_keys)


def weight_of(llm: nn.Module, name: str) -> Tensor:
    above, _, last = name.rpartition(".")
    module = llm.get_submodule(above)
    with align_module_device(module, torch.device("cpu")):
        weight: Tensor = getattr(module, last).detach().clone()
        return weight


def merged_module(
    name: str,
    module: nn.Module,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    state: Mapping[str, Tensor],
    config: Any,
    quantization: Any,
) -> dict[str, Tensor]:
    """The `weights` of one module with LoRA `state` merged; quantized and dequantized to `dtype` before, where
    `quantization` says so. Raises MergeRefused where they aren't finite.
    """
    leaf = copy.copy(module)
    leaf._parameters = {
        key: nn.Parameter(weights[key].detach().clone(), requires_grad=False) if key in weights else None
        for key in module._parameters
    }
    remove_hook_from_module(leaf)
    box: Any = nn.ModuleDict({LEAF: leaf})
    if config is not None:
        config = replace(config, target_modules=[LEAF], task_type=None, inference_mode=False)
    if quantization is not None:
        quantize(box, quantization)
        if state and config.init_lora_weights in CHANGES_BASE:
            box = get_peft_model(box, config).unload()
        dequantize_and_replace(box, quantization, dtype)
        if config is not None:
            config.init_lora_weights = True
    if state:
        wrapped: Any = get_peft_model(box, config)
        report: Any = set_peft_model_state_dict(wrapped, dict(state))
        if report.unexpected_keys:
            raise ArtifactError(f"{name}: PEFT knows no {report.unexpected_keys[0]} for a {type(module).__name__}")
        box = merged_whole(wrapped, name)
    merged = box[LEAF].state_dict()
    if quantization is not None and isinstance(module, Conv1D):  # bitsandbytes holds it as a linear layer, transposed
        merged["weight"] = merged["weight"].T
    return {key: merged[key] for key in weights}


def quantize(box: Any, quantization: Any) -> None:
    """The module becomes bitsandbytes' own, as transformers makes it when it loads a weight."""
    from bitsandbytes.nn import Int8Params, Params4bit

    before = box[LEAF]
    replace_with_bnb_linear(box, [], quantization)
    leaf, weight = box[LEAF], before.weight.data
    settings = {key: value for key, value in leaf.weight.__dict__.items() if key != "SCB"}
    kind: Any = Params4bit if quantization.load_in_4bit else Int8Params
    weight = weight.T if isinstance(before, Conv1D) else weight
    leaf.weight, leaf.bias = kind(weight, requires_grad=False, **settings).to(weight.device), before.bias
    setattr(box, "is_loaded_in_4bit" if quantization.load_in_4bit else "is_loaded_in_8bit", True)  # PEFT asks


def merged_whole(wrapped: Any, name: str = "the LLM") -> Any:
    """PEFT's own merge of all modules at once. Raises MergeRefused where a weight isn't finite."""
    try:
        return wrapped.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise MergeRefused(f"{name}: merging gives weights that aren't finite ({error}). Nothing was kept") from None


def into_dequantized(wrapped: Any, dtype: torch.dtype) -> Any:
    """All at once: LoRA into the LLM that it was trained over, its 4-bit (or 8-bit) weights written out.

    The base under the adapter is dequantized first and wrapped anew with an adapter that starts from nothing, so that
    initialisations that change the base keep the base that they made.
    """
    state, config = get_peft_model_state_dict(wrapped), wrapped.peft_config["default"]
    plain = wrapped.unload().dequantize(dtype=dtype)
    config.init_lora_weights = True
    fresh: Any = get_peft_model(plain, config)
    report: Any = set_peft_model_state_dict(fresh, state)
    if report.unexpected_keys:
        raise MergeRefused(f"the adapter has tensors that the dequantized LLM lacks: {report.unexpected_keys[:3]}")
    return merged_whole(fresh).to(dtype)
