"""Names of the LLM's modules that an adapter belongs to. Adapters stay loadable when transformers renames modules, by
the renamings that transformers itself does when it loads older checkpoints.
"""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import finetune.model.eager_bitsandbytes  # noqa: F401

import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from finetune.common.errors import ArtifactError
from finetune.model.manifest import ModuleShapes

PEFT_PREFIX = "base_model.model."  # before the names of the LLM's modules in PEFT's files
SHOWN = 3  # names of each side in a message


def renamed(saved: Collection[str], current: Collection[str], model: Any) -> dict[str, str]:
    """{saved name: name in the model}, of those that have one. `current`: the names that `model`, a transformers model,
    has. Equal names come first.
    """
    names = {name: name for name in saved if name in current}
    free = set(current) - names.keys()
    for name in saved:
        if name not in names and (new := next((n for n in _successors(name, model) if n in free), None)):
            names[name] = new
            free.remove(new)
    return names


def _successors(name: str, model: Any) -> Iterable[str]:
    """What transformers calls a module by now, one renaming after another."""
    weight = f"{name}.weight"  # transformers' patterns are of weights
    for renaming in get_model_conversion_mapping(model):
        if isinstance(renaming, WeightRenaming):
            weight, pattern = renaming.rename_source_key(weight)
            if pattern is not None:
                yield weight.removesuffix(".weight")


def matched(where: str, saved: Collection[str], current: Collection[str], model: Any) -> dict[str, str]:
    """`renamed`, where every saved name must have its counterpart. Raises ArtifactError with names of both sides."""
    names = renamed(saved, current, model)
    if len(names) == len(saved):
        return names
    lost, free = sorted(set(saved) - names.keys()), sorted(set(current) - set(names.values()))
    raise ArtifactError(
        f"{where}: {len(names) or 'none'} of the {len(saved)} modules that were trained are in this "
        f"{type(model).__name__}. Trained: {_shortened(lost)}; in the model: {_shortened(free)}. It was trained on "
        "another model, or transformers has renamed modules since"
    )


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "") if names else "no others"


def module_shapes(causal_lm: Any) -> ModuleShapes:
    """The modules of an LLM that have LoRA."""
    modules = dict(causal_lm.named_modules())
    sizes = {name: size for name, size in _sizes(causal_lm).items() if isinstance(modules[name], BaseTunerLayer)}
    return ModuleShapes(llm_class=type(causal_lm).__name__, shapes=sizes)


def names_in(trained: ModuleShapes, where: str, language_model: Any) -> dict[str, str]:
    """{module that was trained: its name in an LLM without adapter}. Raises ArtifactError, beginning with `where`, with
    names and sizes of both sides, where the adapter was trained on another LLM.
    """
    sizes = _sizes(language_model)
    names = matched(f"{where}: the adapter doesn't fit the LLM", trained.shapes, sizes, language_model)
    for module, saved in trained.shapes.items():
        if saved != (size := sizes[names[module]]):
            raise ArtifactError(
                f"{where}: the adapter was trained on another LLM: in that {trained.llm_class} {module} takes "
                f"{saved[0]} features and gives {saved[1]}, in this {type(language_model).__name__} it takes "
                f"{size[0]} and gives {size[1]}"
            )
    return names


def _sizes(language_model: Any) -> dict[str, tuple[int, int]]:
    """{module: (features in, features out)} of all modules that can have LoRA."""
    sizes = {}
    for name, module in language_model.named_modules():
        if hasattr(module, "in_features"):
            sizes[name] = (module.in_features, module.out_features)
        elif isinstance(module, transformers.Conv1D):
            sizes[name] = (module.nx, module.nf)
        elif isinstance(module, nn.Embedding):
            sizes[name] = (module.num_embeddings, module.embedding_dim)
    return sizes


def module_of(name: str) -> str:
    """The LLM's module that a tensor of an adapter belongs to."""
    return name.removeprefix(PEFT_PREFIX).partition(".lora_")[0]


def modules(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(map(module_of, names)))


def tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of an adapter folder, mapped into memory. Raises ArtifactError."""
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: train again, or copy the whole adapter folder")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ArtifactError(f"{path} is damaged ({error}): train again, or copy it anew") from None


def is_lora(name: str) -> bool:
    """Whether a parameter of this name is one of PEFT's LoRA weights."""
    return ".lora_" in name
