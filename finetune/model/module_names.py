"""Names of modules, then and now: adapters stay loadable when transformers renames the modules that they hang on.

RENAMES is the table. It gets a line when a new version of transformers renames modules that take LoRA, or whose weights
are kept beside an adapter. A pattern is searched in the old names, from the model's root on, as
`model.layers.0.self_attn.q_proj`. Where the table doesn't help, transformers is asked for the renamings that it does
itself when it loads older checkpoints.
"""

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from finetune.common.errors import ArtifactError
from finetune.common.run_folder import read_json

RENAMES: tuple[tuple[str, str, str], ...] = ()  # (pattern, replacement, version of transformers that renamed it)
PEFT_PREFIX = "base_model.model."  # before the names of the LLM's modules in PEFT's files
SHOWN = 3  # names of each side in a message


def renamed(saved: Collection[str], own: Collection[str], model: Any) -> dict[str, str]:
    """{a saved name: the same in the model}, of those that have one. `own`: the names that `model`, a transformers
    model, has. Equal names come first.
    """
    found = {name: name for name in saved if name in own}
    free = set(own) - found.keys()
    for name in saved:
        if name not in found and (now := next((n for n in _successors(name, model) if n in free), None)):
            found[name] = now
            free.remove(now)
    return found


def _successors(name: str, model: Any) -> Iterable[str]:
    """What a name has become, one renaming after another."""
    for pattern, replacement, _ in RENAMES:
        if (now := re.sub(pattern, replacement, name)) != name:
            name = now
            yield name
    weight = f"{name}.weight"  # transformers' patterns are of weights
    for renaming in get_model_conversion_mapping(model):
        if isinstance(renaming, WeightRenaming):
            weight, pattern_found = renaming.rename_source_key(weight)
            if pattern_found is not None:
                yield weight.removesuffix(".weight")


def matched(where: str, saved: Collection[str], own: Collection[str], model: Any) -> dict[str, str]:
    """`renamed`, where every saved name must have its counterpart. Raises ArtifactError with names of both sides."""
    found = renamed(saved, own, model)
    if len(found) == len(saved):
        return found
    lost, free = sorted(set(saved) - found.keys()), sorted(set(own) - set(found.values()))
    raise ArtifactError(
        f"{where}: {len(found) or 'none'} of the {len(saved)} modules that were trained are in this "
        f"{type(model).__name__}. Trained: {_some(lost)}; in the model: {_some(free)}. It was trained on another "
        "model, or transformers has renamed modules since: then finetune/module_names.py lacks a line"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "") if names else "no others"


def describe(causal_lm: Any) -> dict[str, Any]:
    """What an adapter hangs on, to be saved: {"class": of the LLM, "transformers": version, "shapes": {module: [numbers
    that go in, that come out]}}.
    """
    adapted = dict(causal_lm.named_modules())
    return {
        "class": type(causal_lm).__name__,
        "transformers": transformers.__version__,
        "shapes": {
            name: list(size) for name, size in _sizes(causal_lm).items() if isinstance(adapted[name], BaseTunerLayer)
        },
    }


def fit(folder: Path, language_model: Any) -> dict[str, str]:
    """{module that the adapter in `folder` was trained on: its name in an LLM that has no adapter yet}.

    Raises ArtifactError, with names and sizes of both sides, where it was trained on another LLM.
    """
    content = read_json(folder / "multimodal.json")
    saved = content["modules"]["shapes"] if "modules" in content else _shapes(folder)
    trained = content["modules"]["class"] if "modules" in content else "LLM"
    own = _sizes(language_model)
    now = matched(f"{folder}: the adapter doesn't fit the LLM", saved, own, language_model)
    for module, then in saved.items():
        here = own[now[module]]
        if tuple(then) != here:
            raise ArtifactError(
                f"{folder}: the adapter was trained on another LLM than {content['language_model']['name']!r} is now: "
                f"in that {trained} {module} takes {then[0]} numbers and gives {then[1]}, in this "
                f"{type(language_model).__name__} it takes {here[0]} and gives {here[1]}"
            )
    return now


def _sizes(language_model: Any) -> dict[str, tuple[int, int]]:
    """{module: (numbers that go in, that come out)} of what can have LoRA."""
    found = {}
    for name, module in language_model.named_modules():
        if hasattr(module, "in_features"):
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, transformers.Conv1D):
            found[name] = (module.nx, module.nf)
        elif isinstance(module, nn.Embedding):
            found[name] = (module.num_embeddings, module.embedding_dim)
    return found


def _shapes(folder: Path) -> dict[str, list[int]]:
    """What `describe` saves as "shapes", from the tensors of an adapter that was saved without."""
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors(folder / "adapter_model.safetensors", "the adapter").items():
        size = shapes.setdefault(module_of(name), [0, 0])
        if re.search(r"\.lora_(embedding_)?A", name):
            size[0] = tensor.shape[1]
        elif re.search(r"\.lora_(embedding_)?B", name):
            size[1] = tensor.shape[0]
    return shapes


def module_of(name: str) -> str:
    """The LLM's module that a tensor of an adapter belongs to."""
    return name.removeprefix(PEFT_PREFIX).partition(".lora_")[0]


def modules(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(map(module_of, names)))


def tensors(path: Path, what: str) -> dict[str, Tensor]:
    """A safetensors file; `what`: is in it. Raises ArtifactError."""
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: {what} can't be loaded")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ArtifactError(f"{path} is damaged: {error}; {what} can't be loaded") from None


def is_lora(name: str) -> bool:
    """Whether a parameter of this name is one of PEFT's LoRA weights."""
    return ".lora_" in name
