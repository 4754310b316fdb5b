"""LoRA by PEFT on the LLM part, and the folder that is published: what was trained, and how to rebuild the rest."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor

from finetune.common.errors import ArtifactError, ModelError
from finetune.common.run_folder import read_json
from finetune.model import module_names
from finetune.model.asks import Ask
from finetune.model.composite import MultimodalModel
from finetune.model.module_names import is_lora

FORMAT = 4
READABLE = (2, 3, 4)  # 2 had no heads, 3 didn't name the LLM's modules
MERGED_FORMAT = 1  # of merged folders: `parts.format` in their config; without one they are 1


def attach(
    model: MultimodalModel,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    rslora: bool = False,
    dora: bool = False,
    initialization: str = "default",
) -> None:
    """Wrap `model.language_model`, and nothing else, with LoRA.

    `targets`: 'all-linear' (all but the output head), or names of the LLM's own modules. `initialization`: any name
    that PEFT's `init_lora_weights` takes ('pissa', 'olora', 'gaussian', ...). Raises ModelError.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=rslora,
        use_dora=dora,
        init_lora_weights=True if initialization == "default" else initialization,  # type: ignore[arg-type]
    )
    try:
        model.language_model = get_peft_model(model.language_model, config)
    except (ValueError, ImportError, TypeError) as error:
        raise ModelError(f"adapter: PEFT refuses it: {str(error).splitlines()[0]}") from error
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ModelError(
            "adapter.targets: the output head can't be one: the loss reads its weights directly; leave it out"
        )


def saved_asks(folder: Path) -> dict[str, Ask]:
    """What an adapter folder was trained for: heads' labels and scales are those of its training rows, whatever their
    files hold today.
    """
    content = read_json(folder / "multimodal.json")
    return {name: Ask.restore(saved) for name, saved in content.get("asks", {}).items()}


def options_for(folder: Path, language_model: Any) -> dict[str, Any] | None:
    """The keywords of `attach` for the adapter in `folder` over an LLM that has none yet, whose modules may have been
    renamed since; None where the folder has no adapter.

    Raises ArtifactError where it was made for another LLM: names and sizes of both sides.
    """
    if not (folder / "adapter_config.json").is_file():
        return None
    options = options_of(read_json(folder / "adapter_config.json"))
    now = module_names.fit(folder, language_model)
    if any(then != module for then, module in now.items()):
        options["targets"] = sorted(now.values())
    return options


def options_of(lora: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `attach` from a saved adapter_config.json."""
    initialization = lora["init_lora_weights"]
    return {
        "rank": lora["r"],
        "alpha": lora["lora_alpha"],
        "dropout": lora["lora_dropout"],
        "targets": lora["target_modules"],
        "rslora": lora["use_rslora"],
        "dora": lora["use_dora"],
        "initialization": initialization if isinstance(initialization, str) else "default",
    }


def _own_tensors(model: MultimodalModel) -> dict[str, Tensor]:
    """What `projectors.safetensors` holds, by role: projectors, fusion blocks, heads, and what trains of encoders."""
    return {
        **{f"projectors.{name}": tensor for name, tensor in model.projectors.state_dict().items()},
        **{f"fusion.{name}": tensor for name, tensor in model.fusion.state_dict().items()},
        **{f"heads.{name}": tensor for name, tensor in model.heads.state_dict().items()},
        **{
            f"encoders.{name}.{inside}": model.encoders[name].get_parameter(inside)
            for name, names in model.tuned.items()
            for inside in names
        },
    }


def save_trained(model: MultimodalModel, folder: Path) -> None:
    """Write `adapter_model.safetensors` (PEFT's own) and `projectors.safetensors`: all that can have been trained."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model.language_model, PeftModel):
        model.language_model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
        # PEFT's card names the base by its local path; ours is written where the adapter is published.
        (folder / "README.md").unlink(missing_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _own_tensors(model).items()}
    save_file(tensors, folder / "projectors.safetensors")


def load_trained(model: MultimodalModel, folder: Path) -> dict[str, int]:
    """Load what `save_trained` wrote into a model of the same parts; {role: tensors matched}. Encoders that the model
    doesn't hold, because it is given features, are left out.

    Raises ArtifactError where a part is missing, matches nothing, or has other names or shapes.
    """
    matched: dict[str, int] = {}
    if isinstance(model.language_model, PeftModel):
        path = folder / "adapter_model.safetensors"
        saved = module_names.tensors(path, "the adapter")
        own = {_plain(name): p for name, p in model.language_model.named_parameters() if is_lora(name)}
        now = module_names.matched(str(path), module_names.modules(saved), module_names.modules(own), model.causal_lm)
        moved = {}
        for name, tensor in saved.items():
            module = module_names.module_of(name)
            moved[name.replace(module, now[module], 1)] = tensor
        matched["adapter"] = _copy(path, moved, own)
    path = folder / "projectors.safetensors"
    saved = module_names.tensors(path, "the projectors")
    if not model.tuned:
        saved = {name: tensor for name, tensor in saved.items() if not name.startswith("encoders.")}
    for medium, names in model.tuned.items():
        weights = [name.removeprefix(f"encoders.{medium}.") for name in saved if name.startswith(f"encoders.{medium}.")]
        for then, now_called in module_names.renamed(weights, names, model.encoders[medium]).items():
            saved[f"encoders.{medium}.{now_called}"] = saved.pop(f"encoders.{medium}.{then}")
    _copy(path, saved, _own_tensors(model))
    for name in saved:
        group, inside = name.split(".")[:2]
        role = group if group == "fusion" else f"{group}.{inside}"
        matched[role] = matched.get(role, 0) + 1
    return matched


@torch.no_grad()
def _copy(path: Path, saved: dict[str, Tensor], own: Mapping[str, Tensor]) -> int:
    """Copy saved tensors over those of the same names. Raises ArtifactError where names or shapes differ."""
    _compare(path, {k: v.shape for k, v in saved.items()}, {k: v.shape for k, v in own.items()})
    for name, tensor in saved.items():
        own[name].copy_(tensor)
    return len(saved)


def save_adapter_folder(
    model: MultimodalModel,
    tokenizer: Any,
    folder: Path,
    *,
    base: dict[str, Any],
    seed: int,
    media: dict[str, Any],
) -> None:
    """Write the publishable folder. `base`: the LLM's and encoders' names and revisions; `media`: bounds of what is
    decoded; `seed`: new weights of tuned encoders and of some adapters draw from it.
    """
    save_trained(model, folder)
    tokenizer.save_pretrained(folder)
    parts = model.config.parts
    content = {
        "format": FORMAT,
        "language_model": base["language_model"],
        "language_model_sha256": base.get("language_model_sha256", {}),
        "encoders": base["encoders"],
        "projectors": parts["projectors"],
        "fusion": parts["fusion"],
        "tune_encoders": base["tune_encoders"],
        "placeholders": parts["placeholders"],
        "asks": parts["asks"],
        "media": media,
        "seed": seed,
        "modules": module_names.describe(model.causal_lm),
    }
    (folder / "multimodal.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    config_path = folder / "adapter_config.json"
    if config_path.is_file():  # a relative or local path of this machine is of no use elsewhere
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base["language_model"]["name"]
        config["revision"] = base["language_model"].get("revision")
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _plain(name: str) -> str:
    """A parameter's name as PEFT writes it to file: without the adapter's own name."""
    name = name.replace(".default.", ".").removesuffix(".default")
    return name.removesuffix(".weight") if "lora_magnitude_vector" in name else name


def _compare(path: Path, saved: dict[str, Any], own: dict[str, Any]) -> None:
    if saved == own:
        return
    missing, foreign = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    other = [name for name in own.keys() & saved.keys() if own[name] != saved[name]]
    raise ArtifactError(
        f"{path} doesn't fit the model: {len(own.keys() & saved.keys()) - len(other)} of {len(own)} tensors match"
        + (f"; only in the model: {missing[0]} ..." if missing else "")
        + (f"; only in the file: {foreign[0]} ..." if foreign else "")
        + (f"; other shape: {other[0]} {tuple(saved[other[0]])} instead of {tuple(own[other[0]])}" if other else "")
    )
