"""The merged folder: tensors of all parts in shards, config, tokenizer."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from finetune.common.errors import ArtifactError
from finetune.common.run_folder import write_json
from finetune.model.compose import composition_of_base
from finetune.model.composition import BASE_FILE, HEADS_FILE
from finetune.model.run import Run
from finetune.model.tokenize import answer_ends

SHARD_BYTES = 2 * 10**9


class Shards:
    """Tensors to files of at most `limit` bytes, named as transformers names them once all are written."""

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder, self.limit = folder, limit or SHARD_BYTES
        self.waiting: dict[str, Tensor] = {}
        self.bytes = self.total = 0
        self.files: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        if self.waiting and self.bytes + tensor.nbytes > self.limit:
            self._write()
        self.waiting[name] = tensor
        self.bytes += tensor.nbytes
        self.total += tensor.nbytes

    def _write(self) -> None:
        path = self.folder / f"shard-{len(self.files)}.safetensors"
        try:
            save_file(self.waiting, path, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{self.folder}: can't be written ({error}); make room, and merge again") from None
        self.files.append((path, list(self.waiting)))
        self.waiting, self.bytes = {}, 0

    def close(self) -> None:
        if self.waiting:
            self._write()
        if len(self.files) == 1:
            os.replace(self.files[0][0], self.folder / "model.safetensors")
            return
        places: dict[str, str] = {}
        for number, (path, names) in enumerate(self.files, 1):
            final = f"model-{number:05d}-of-{len(self.files):05d}.safetensors"
            os.replace(path, self.folder / final)
            places |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total}, "weight_map": places}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def write_merged(
    folder: Path, llm: Any, tensors: Iterator[tuple[str, Tensor]], parts: Mapping[str, Tensor], run: Run
) -> None:
    """One self-contained folder: weights of all parts, config with the encoders' preprocessing, tokenizer.

    `llm`: for its configs; `tensors`: its merged state, as a stream; `parts`: the state of projectors, fusion and
    heads. The run's components hold the encoders as they are saved.
    """
    components = run.components
    whole = components.compose(llm, run.bindings)
    whole.config.dtype = llm.config.dtype
    llm.config._name_or_path = without_paths(llm.config._name_or_path)
    composition = whole.composition.model_copy(update={"media": run.recipe.media}).model_dump(mode="json")
    for encoder in composition["encoders"].values():
        encoder["settings"] = without_paths(encoder["settings"])
    whole.config.parts = composition
    encoders = {f"encoders.{name}": tensor for name, tensor in whole.encoders.state_dict().items()}
    whole.save_pretrained(folder, state_dict={**parts, **encoders})  # the LLM's follow, in a stream
    shards = Shards(folder)
    for name, tensor in removed_tensors(folder):
        shards.add(name, tensor)
    for name, tensor in tensors:
        shards.add(f"language_model.{name}", tensor)
    shards.close()
    generation = llm.generation_config
    generation.eos_token_id = answer_ends(components.tokenizer, generation)
    generation.save_pretrained(folder)
    components.tokenizer.save_pretrained(folder)


def write_merged_base(
    folder: Path, base: Any, tensors: Iterator[tuple[str, Tensor]], parts: Mapping[str, Tensor], run: Run
) -> None:
    """A base with its adapter merged, as the class of transformers that it is, with its processor; and beside them
    what it was trained for, and the weights of heads.

    `base`: for its configs; `tensors`: its merged state, as a stream; `parts`: its projectors and encoders that have
    trained, and heads.
    """
    existing = run.components.base
    assert existing is not None
    folder.mkdir(parents=True, exist_ok=True)
    base.config._name_or_path = without_paths(base.config._name_or_path)
    base.config.save_pretrained(folder)
    base.generation_config.eos_token_id = answer_ends(existing.tokenizer, base.generation_config)
    base.generation_config.save_pretrained(folder)
    shards = Shards(folder)
    for _, layer in groupby(tensors, _layer):  # files have other names and tensors than a layer in memory
        merged = {name: parts.get(f"base.{name}", tensor).to(tensor.dtype) for name, tensor in layer}
        for name, tensor in revert_weight_conversion(base, merged).items():
            shards.add(name, tensor.contiguous())
    shards.close()
    existing.save_processor(folder)
    composition = composition_of_base(existing, run.bindings).model_copy(update={"media": run.recipe.media})
    write_json(folder / BASE_FILE, composition.model_dump(mode="json"))
    if heads := {name.removeprefix("heads."): parts[name] for name in parts if name.startswith("heads.")}:
        save_file(heads, folder / HEADS_FILE)


def _layer(named: tuple[str, Tensor]) -> str:
    """The layer that a tensor is in, by the first number in its name."""
    name = named[0]
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else name


def without_paths(value: Any) -> Any:
    """A config in which local folders are named by their last part: their place is nobody's business."""
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def removed_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder's files of weights, which are removed."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
