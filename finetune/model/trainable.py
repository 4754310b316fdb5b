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
            parts[role] = [p for name, p in model.language_model.named_parameters() if is_lora(name)]
            if not parts[role]:
                raise ModelError("a stage trains the adapter, but no adapter is attached to the language model")
        elif group == "fusion":
            parts[role] = list(model.fusion.parameters())
        elif group == "heads":
            parts |= {f"heads.{name}": list(head.parameters()) for name, head in model.heads.items()}
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
    parts = trained_parts(model, trains)
    for parameters in parts.values():
        for parameter in parameters:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    expected = {id(p) for parameters in parts.values() for p in parameters}
    prefixes = tuple("language_model." if role == "adapter" else f"{role}." for role in parts)
    wrong = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad != (id(parameter) in expected)
        or (parameter.requires_grad and not name.startswith(prefixes))
    ]
    if wrong:
        raise TrainingError(f"not the parts that the recipe trains ({', '.join(trains)}): {', '.join(wrong[:5])}")
    return {role: sum(p.numel() for p in parameters) for role, parameters in parts.items()}
