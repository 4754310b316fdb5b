"""What a stage trains, asserted by name."""

from collections.abc import Sequence

from torch import nn

from finetune.common.errors import ModelError, TrainingError
from finetune.model.composite import MultimodalModel
from finetune.model.module_names import is_lora


def trained_parts(model: MultimodalModel, trains: Sequence[str]) -> dict[str, list[nn.Parameter]]:
    """{role: its parameters} for what a stage trains: 'adapter', 'fusion', 'heads', 'projectors' or
    'projectors.image', 'encoders' or 'encoders.image'.
    """
    parts: dict[str, list[nn.Parameter]] = {}
    for role in trains:
        group, _, name = role.partition(".")
        if group == "adapter":
            of_encoders = {
                id(model.causal_lm.get_parameter(n)) for names in model.tuned_in_base.values() for n in names
            }
            lora = [p for name, p in model.language_model.named_parameters() if is_lora(name)]
            parts[role] = [p for p in lora if id(p) not in of_encoders]
            if not parts[role]:
                raise ModelError("a stage trains the adapter, but no adapter is attached to the language model")
        elif group == "fusion":
            parts[role] = list(model.fusion.parameters())
        elif group == "heads":
            parts |= {f"heads.{name}": list(head.parameters()) for name, head in model.heads.items()}
        elif model.composition.base and group in ("encoders", "projectors"):
            parts |= _parts_of_base(model, group, name)
        elif group == "encoders":
            for medium in [name] if name else model.tuned:
                parts[f"encoders.{medium}"] = [model.encoders[medium].get_parameter(n) for n in model.tuned[medium]]
        else:
            for medium in [name] if name else model.projectors:
                parts[f"projectors.{medium}"] = list(model.projectors[medium].parameters())
    return parts


def set_trainable(model: MultimodalModel, trains: Sequence[str]) -> dict[str, int]:
    """Make exactly the named parts trainable; {role: number of weights}.

    Raises TrainingError, with names, where what trains isn't what the recipe says.
    """
    model.requires_grad_(False)
    model.live = {}
    parts = trained_parts(model, trains)
    for parameters in parts.values():
        for parameter in parameters:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    expected = {id(p) for parameters in parts.values() for p in parameters}
    in_llm = ("adapter", *(("projectors", "encoders") if model.composition.base else ()))
    prefixes = tuple("language_model." if role.partition(".")[0] in in_llm else f"{role}." for role in parts)
    wrong = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad != (id(parameter) in expected)
        or (parameter.requires_grad and not name.startswith(prefixes))
    ]
    if wrong:
        raise TrainingError(f"not the parts that the recipe trains ({', '.join(trains)}): {', '.join(wrong[:5])}")
    return {role: sum(p.numel() for p in parameters) for role, parameters in parts.items()}


def _parts_of_base(model: MultimodalModel, group: str, medium: str) -> dict[str, list[nn.Parameter]]:
    """{role: parameters}; those that several media share are the first one's. Raises ModelError."""
    parts: dict[str, list[nn.Parameter]] = {}
    seen: set[str] = set()
    for name, roles in model.roles.items():
        wanted = roles.projector if group == "projectors" else model.tuned_in_base.get(name, ())
        if medium not in ("", name) or not wanted:
            continue
        model.train_in_base(name, wanted)
        if own := [one for one in wanted if one not in seen]:
            seen.update(own)
            parts[f"{group}.{name}"] = [model.causal_lm.get_parameter(one) for one in own]
    if not parts:
        raise ModelError(f"a stage trains {group}{f'.{medium}' * bool(medium)}, which this base doesn't have")
    return parts
