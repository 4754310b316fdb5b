"""Which parameters of a base are its language model, its encoders and its projectors."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.common.errors import ModelError
from finetune.model.base.existing import beside_language, language_modules
from finetune.model.module_names import is_lora
from finetune.recipe.schema import EncoderTuning


@dataclass(frozen=True)
class MediumRoles:
    """Names, in the base, of the parameters that the features of one medium come from."""

    encoder: tuple[str, ...]
    projector: tuple[str, ...]


def linear_layers(model: Any, targets: str | list[str]) -> list[str]:
    """Full names of the decoder's linear layers: all, or those whose names end in one of `targets`. Raises ModelError
    where there are none.
    """
    names = _linear_names(model, language_modules(model), targets)
    if not names:
        wanted = "linear layers" if targets == "all-linear" else f"modules {', '.join(targets)}"
        raise ModelError(f"adapter.targets: the decoder of this {type(model).__name__} has no {wanted}")
    return names


def tower_layers(model: Any, kind: str, targets: str | list[str]) -> list[str]:
    """As `linear_layers`, of the encoder of a kind of media."""
    names = _linear_names(model, encoder_of(model, kind).modules(), targets)
    if not names:
        raise ModelError(f"tune_encoders.{kind}: the base's encoder has none of the linear layers that are targets")
    return names


def tuned_names(model: Any, kind: str, tuning: EncoderTuning) -> list[str]:
    """Names of the parameters of an encoder that train: its LoRA, or those of its last layers. Raises ModelError."""
    tower = encoder_of(model, kind)
    if tuning.last_layers is None:
        inside = {id(p) for p in tower.parameters()}
        return [name for name, p in model.named_parameters() if is_lora(name) and id(p) in inside]
    layers = layers_of(tower)
    if tuning.last_layers > len(layers):
        raise ModelError(
            f"tune_encoders.{kind}: last_layers is {tuning.last_layers}, but the base's encoder has {len(layers)}"
        )
    chosen = {id(p) for layer in layers[-tuning.last_layers :] for p in layer.parameters()}
    return [name for name, p in model.named_parameters() if id(p) in chosen]


def _linear_names(model: Any, among: Iterable[nn.Module], targets: str | list[str]) -> list[str]:
    own = {id(module) for module in among if isinstance(module, nn.Linear)}
    names = [name for name, module in model.named_modules() if id(module) in own]
    if targets == "all-linear":
        return names
    return [name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)]


def roles_of(model: Any, kind: str, features: Callable[[], Tensor]) -> MediumRoles:
    """The roles of one medium's parameters, by trial: `features()` computes the features of any medium of this kind.

    Parameters that the features depend on are the encoder's if they are in the module that transformers gives as such,
    else the projector's. Where that module holds all of them (Qwen's `merger`), the projector's are those behind the
    encoder's last layer. Raises ModelError.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    tower = encoder_of(model, kind)
    inputs: list[Tensor] = []
    last = layers_of(tower)[-1]
    handle = last.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    language = {id(p) for p in model.get_output_embeddings().parameters()}
    language |= {id(p) for module in language_modules(model) for p in module.parameters(recurse=False)}
    tried = {id(p): p for p in model.parameters() if p.is_floating_point() and id(p) not in language}
    before = {key: p.requires_grad for key, p in tried.items()}
    try:
        for p in tried.values():
            p.requires_grad_(True)
        with torch.enable_grad():
            used = _reached(features().float().sum(), tried, keep=True)
            within = {id(p) for p in tower.parameters()}
            outside = used - within
            if not outside:
                read = _reached(sum(one.float().sum() for one in inputs), tried)  # by the last layer
                outside = used - read - {id(p) for p in last.parameters()}
    finally:
        handle.remove()
        for key, p in tried.items():
            p.requires_grad_(before[key])
    encoder = tuple(name for key, name in names.items() if key in used - outside)
    projector = tuple(name for key, name in names.items() if key in outside)
    if not encoder or not projector:
        raise ModelError(
            f"in this {type(model).__name__} the trial doesn't separate the encoder of {kind} from its projector: "
            "train the adapter alone"
        )
    return MediumRoles(encoder, projector)


def _reached(total: Any, parameters: dict[int, nn.Parameter], keep: bool = False) -> set[int]:
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, retain_graph=keep)
    return {key for key, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def encoder_of(model: Any, kind: str) -> Any:
    """The module that encodes media of a kind: transformers' accessor knows most; else the only model beside the
    language model, or the only one that says that it takes this kind. Raises ModelError.
    """
    decoder = model.get_decoder()
    found = model.get_encoder(modality=kind)
    if not any(module is decoder for module in found.modules()):
        return found
    beside = [model.get_submodule(name) for name in beside_language(model)]
    others = [m for part in beside for m in part.modules() if isinstance(m, PreTrainedModel)]
    if len(others) > 1:
        others = [m for m in others if kind in m.input_modalities]
    if len(others) == 1:
        return others[0]
    raise ModelError(f"this {type(model).__name__} has no accessor for its encoder of {kind}")


def layers_of(tower: Any) -> nn.ModuleList:
    """An encoder's layers: its longest list of modules of one class. Raises ModelError."""
    lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len({type(one) for one in m}) == 1]
    if not lists:
        raise ModelError(f"{type(tower).__name__} has no list of layers")
    return max(lists, key=len)
