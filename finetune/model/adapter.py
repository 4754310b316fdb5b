"""LoRA by PEFT on the LLM, and the folder that is published: what was trained, and how to rebuild the rest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import finetune.model.eager_bitsandbytes  # noqa: F401

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.common.errors import ArtifactError, ModelError
from finetune.common.hub import reading
from finetune.common.run_folder import read_json, write_json
from finetune.model.base.roles import linear_layers, tower_layers
from finetune.model.composite import MultimodalModel
from finetune.model.fused_lora import fuse
from finetune.model.manifest import MANIFEST, AdapterManifest
from finetune.model.module_names import is_lora, matched, module_of, modules, names_in, renamed, tensors
from finetune.recipe.schema import Adapter, EncoderTuning


def attach(model: MultimodalModel, adapter: Adapter | None, tuning: Mapping[str, EncoderTuning] = {}) -> None:
    """Wrap `model.language_model`, and nothing else, with LoRA. `tuning`: of a base's encoders, whose LoRA is part of
    the same. Raises ModelError.
    """
    only_encoders, adapter = adapter is None, adapter or Adapter()
    initialization: Any = True if adapter.initialization == "default" else adapter.initialization
    targets: Any = adapter.targets
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    if model.composition.base:  # by full names, so that no other part has LoRA
        targets = [] if only_encoders else linear_layers(model.language_model, adapter.targets)
        for kind, tuned in tuning.items():
            for name in tower_layers(model.language_model, kind, tuned.targets) if tuned.rank else ():
                ranks[name], alphas[name] = tuned.rank or 0, tuned.alpha
        targets = [*targets, *ranks]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=targets,
        exclude_modules=routers(model.language_model) or None,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        init_lora_weights=initialization,
        rank_pattern=ranks,
        alpha_pattern=alphas,  # type: ignore[arg-type]
    )
    fuse(config, model.language_model)
    try:
        model.language_model = get_peft_model(model.language_model, config)
    except (ValueError, ImportError, TypeError) as error:
        raise ModelError(f"adapter: PEFT refuses it: {str(error).splitlines()[0]}") from error
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ModelError(
            "adapter.targets: the output head can't be one: the loss reads its weights directly; leave it out"
        )


@torch.no_grad()
def routers(language_model: nn.Module) -> list[str]:
    """Names of linear layers of an LLM that give something else than a tensor, as Phi-MoE's routers, which give a pair:
    LoRA takes them for plain ones.
    """
    layers = [(name, one) for name, one in language_model.named_modules() if isinstance(one, nn.Linear)]
    own = [(name, one) for name, one in layers if type(one).__module__.startswith("transformers.models.")]
    return [name for name, one in own if not isinstance(one(one.weight.new_zeros(1, one.in_features)), Tensor)]


def saved_adapter(folder: Path) -> Adapter | None:
    """LoRA's settings as they were trained; None where the folder has no LoRA."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    lora = read_json(path)
    with reading(path):
        initialization = lora["init_lora_weights"]
        return Adapter(
            rank=lora["r"],
            alpha=lora["lora_alpha"],
            dropout=lora["lora_dropout"],
            targets=lora["target_modules"],
            rslora=lora["use_rslora"],
            dora=lora["use_dora"],
            initialization=initialization if isinstance(initialization, str) else "default",
        )


def fitted_adapter(folder: Path, language_model: Any) -> Adapter | None:
    """`saved_adapter` for an LLM without adapter, whose modules may have been renamed since.

    Raises ArtifactError where it was trained on another LLM: names and sizes of both sides.
    """
    adapter = saved_adapter(folder)
    if adapter is None:
        return None
    names = names_in(AdapterManifest.read(folder).modules, str(folder), language_model)
    if any(saved != current for saved, current in names.items()):
        return adapter.model_copy(update={"targets": sorted(names.values())})
    return adapter


def added_weights(model: MultimodalModel) -> dict[str, Tensor]:
    """The weights of projectors, fusion and heads; of a base, those of its projectors and encoders that train, under
    their names in it.
    """
    groups = ("projectors", "fusion", "heads")
    own = {f"base.{name}": model.causal_lm.get_parameter(name) for name in model.changed}
    return own | {f"{group}.{name}": t for group in groups for name, t in getattr(model, group).state_dict().items()}


def _own_tensors(model: MultimodalModel) -> dict[str, Tensor]:
    """The content of `projectors.safetensors`: `added_weights`, and those of tuned encoders that train."""
    return added_weights(model) | {
        f"encoders.{medium}.{name}": model.encoders[medium].get_parameter(name)
        for medium, names in model.tuned.items()
        for name in names
    }


def trained_tensors(model: MultimodalModel) -> dict[str, Tensor]:
    """All weights that `save_trained` writes, under the model's own names."""
    lora = {name: p for name, p in model.language_model.named_parameters() if is_lora(name)}
    return _own_tensors(model) | {f"language_model.{name}": p for name, p in lora.items()}


def save_trained(model: MultimodalModel, folder: Path) -> None:
    """Write `adapter_model.safetensors` (PEFT's own) and `projectors.safetensors`: all that can have been trained."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model.language_model, PeftModel):
        # PEFT's card names the base by its local path; ours is written where the adapter is published. One that is
        # there is changed, in a quarter of the time that a new one takes.
        card = folder / "README.md"
        card.write_text("---\nlibrary_name: peft\n---\n")
        model.language_model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
        card.unlink()
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in _own_tensors(model).items()}
    save_file(content, folder / "projectors.safetensors")


def load_trained(model: MultimodalModel, folder: Path) -> None:
    """Load what `save_trained` wrote into a model of the same parts. Weights of encoders that the model doesn't hold,
    because it is given features, are left out.

    Raises ArtifactError where a part is missing, matches nothing, or has other names or shapes.
    """
    if isinstance(model.language_model, PeftModel):
        path = folder / "adapter_model.safetensors"
        saved = tensors(path)
        own = {_plain(name): p for name, p in model.language_model.named_parameters() if is_lora(name)}
        names = matched(str(path), modules(saved), modules(own), model.causal_lm)
        _copy(path, {name.replace(old := module_of(name), names[old], 1): t for name, t in saved.items()}, own)
    path = folder / "projectors.safetensors"
    saved = tensors(path)
    if model.composition.base:
        _take_changed(model, path, saved)
    if not model.tuned:
        saved = {name: tensor for name, tensor in saved.items() if not name.startswith("encoders.")}
    for medium, names_in_model in model.tuned.items():
        prefix = f"encoders.{medium}."
        weights = [name.removeprefix(prefix) for name in saved if name.startswith(prefix)]
        for old, new in renamed(weights, names_in_model, model.encoders[medium]).items():
            saved[f"{prefix}{new}"] = saved.pop(f"{prefix}{old}")
    _copy(path, saved, _own_tensors(model))


def _take_changed(model: MultimodalModel, path: Path, saved: dict[str, Tensor]) -> None:
    """Take note of a base's own parameters in a file, under the names that they have by now. Raises ArtifactError."""
    names = [name.removeprefix("base.") for name in saved if name.startswith("base.")]
    current = matched(str(path), names, [name for name, _ in model.causal_lm.named_parameters()], model.causal_lm)
    for old, new in current.items():
        saved[f"base.{new}"] = saved.pop(f"base.{old}")
    model.changed = [*dict.fromkeys([*model.changed, *current.values()])]


@torch.no_grad()
def _copy(path: Path, saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Copy saved tensors over those of the same names. Raises ArtifactError where names or shapes differ."""
    shapes, own_shapes = ({name: tensor.shape for name, tensor in both.items()} for both in (saved, own))
    if shapes != own_shapes:
        missing, foreign = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
        differ = [name for name in own.keys() & saved.keys() if shapes[name] != own_shapes[name]]
        raise ArtifactError(
            f"{path} doesn't fit the model: {len(own.keys() & saved.keys()) - len(differ)} of {len(own)} tensors match"
            + (f"; only in the model: {missing[0]} ..." if missing else "")
            + (f"; only in the file: {foreign[0]} ..." if foreign else "")
            + "".join(f"; other shape: {n} {tuple(shapes[n])} instead of {tuple(own_shapes[n])}" for n in differ[:1])
        )
    for name, tensor in saved.items():
        own[name].copy_(tensor)


def save_adapter_folder(model: MultimodalModel, tokenizer: Any, folder: Path, manifest: AdapterManifest) -> None:
    """Write the publishable folder."""
    llm = manifest.model.language_model
    for config in getattr(model.language_model, "peft_config", {}).values():
        config.base_model_name_or_path, config.revision = llm.name, llm.revision
    save_trained(model, folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))


def _plain(name: str) -> str:
    """A parameter's name as PEFT writes it to file: without the adapter's own name."""
    name = name.replace(".default.", ".").removesuffix(".default")
    return name.removesuffix(".weight") if "lora_magnitude_vector" in name else name
