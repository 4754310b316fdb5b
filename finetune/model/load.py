"""A model from a folder or the Hub."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoConfig, GenerationConfig

from finetune.common import certificate, hub
from finetune.common.errors import ArtifactError, ModelError
from finetune.common.progress import quiet_libraries
from finetune.common.run_folder import RunLike, damaged, read_json
from finetune.model.adapter import fitted_adapter, load_trained
from finetune.model.assistant import Assistant
from finetune.model.base.encoder import BaseEncoder
from finetune.model.base.existing import ExistingModel
from finetune.model.bounds import refuse_oversized
from finetune.model.build import Components, build_model, load_components, load_llm
from finetune.model.compose import compose_base
from finetune.model.composite import MultimodalModel
from finetune.model.composition import BASE_FILE, HEADS_FILE, MERGED_FORMAT, PLACEHOLDERS, Composition
from finetune.model.language_model import default_device, load_tokenizer, resolve_dtype
from finetune.model.manifest import MANIFEST, AdapterManifest, refuse_format
from finetune.model.tokenize import Placeholder
from finetune.model.trained_for import folder_of_model, refuse_missing
from finetune.recipe.schema import Base

COMMIT = "[0-9a-f]{40}"


def load(
    folder: RunLike,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    *,
    revision: str | None = None,
) -> Assistant:
    """Rebuild a model from a merged folder, an adapter folder, a run (its merged model if there is one), or a Hub id,
    as "user/name", with its branch, tag or commit as `revision`.

    `trust_remote_code` lets an adapter's LLM run code of its Hub repository: the adapter can't ask for it by itself,
    and must name a commit. Raises ArtifactError for a folder that is none of these, or whose files don't fit, and
    ModelError where the Hub doesn't deliver.
    """
    quiet_libraries()
    return load_folder(model_folder(folder, revision), device, trust_remote_code)


def model_folder(source: RunLike, revision: str | None = None) -> Path:
    """The folder that `load` reads, its files as certified."""
    refuse_missing(source)
    path = Path(source)
    if not path.exists():
        return hub.fetched(os.fspath(source), revision)
    if revision is not None:
        raise ModelError(f"{path}: a revision is for models of the Hub, not for folders")
    path = folder_of_model(path)
    certificate.verify_if_certified(path)
    return path


def load_folder(path: Path, device: torch.device | None = None, trust_remote_code: bool = False) -> Assistant:
    """A merged folder or an adapter folder. Raises as `load`."""
    if (path / MANIFEST).is_file():
        return load_adapter(path, device, trust_remote_code)
    if (path / "config.json").is_file():
        return load_merged(path, device)
    raise ArtifactError(
        f"{path}: no merged model, no adapter and no run that has got that far: `finetune train` writes one"
    )


def load_merged(folder: Path, device: torch.device | None = None) -> Assistant:
    """A folder that `merge` wrote, from its own files alone."""
    device = device or default_device()
    if (folder / BASE_FILE).is_file():
        return load_merged_base(folder, device)
    with hub.reading(folder / "config.json"):
        composition = read_composition(folder)
        hub.verify_weights(folder)
        model: Any = load_exactly(MultimodalModel, folder)
    model = model.to(device).eval()
    if (folder / "generation_config.json").is_file():
        with hub.reading(folder / "generation_config.json"):
            model.language_model.generation_config = GenerationConfig.from_pretrained(folder)
    placeholders = {name: Placeholder(PLACEHOLDERS[name], id) for name, id in composition.placeholders.items()}
    return Assistant(model, load_tokenizer(str(folder)), placeholders, model.encoder_parts, composition.media)


def load_merged_base(
    folder: Path, device: torch.device, load: Callable[[ExistingModel], None] = lambda base: None
) -> Assistant:
    """A merged base: an ordinary folder of transformers, with what it was trained for beside. `load`: sets the weights
    of the base otherwise than it loads them by itself. Raises ArtifactError, ModelError.
    """
    composition = read_base_composition(folder)
    hub.verify_weights(folder)
    dtype = AutoConfig.from_pretrained(folder).dtype or torch.float32
    base = ExistingModel.load(Base(name=str(folder), quantize="none"), dtype, device)
    load(base)
    encoders = {name: BaseEncoder(base, name) for name in composition.placeholders if name in base.media}
    model = compose_base(encoders, composition.bindings).eval()
    if model.heads:
        model.heads.load_state_dict(load_file(folder / HEADS_FILE))
    return Assistant(model, base.tokenizer, base.placeholders(), encoders, composition.media)


def load_base(settings: Base) -> Assistant:
    """A model of transformers that takes media, as it is. Raises ModelError."""
    device = default_device()
    base = ExistingModel.load(settings, resolve_dtype(settings.dtype, device), device)
    encoders = {name: BaseEncoder(base, name) for name in base.media}
    return Assistant(compose_base(encoders).eval(), base.tokenizer, base.placeholders(), encoders)


def read_base_composition(folder: Path) -> Composition:
    """What a merged base was trained for. Raises ArtifactError."""
    with hub.reading(folder / BASE_FILE):
        content = read_json(folder / BASE_FILE)
        refuse_format(folder, content.get("format"), MERGED_FORMAT, "merge")
        return Composition.model_validate(content)


def load_exactly(model_class: Any, folder: Path, **kwargs: Any) -> Any:
    """`model_class.from_pretrained(folder, dtype="auto", **kwargs)`, refused if any of its weights don't fit.

    transformers would initialize missing weights at random and ignore unexpected ones. Raises ArtifactError with the
    first missing, unexpected and mismatched keys.
    """
    model, report = model_class.from_pretrained(folder, output_loading_info=True, **{"dtype": "auto", **kwargs})
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    if wrong := {kind: sorted(report[kind])[:3] for kind in kinds if report[kind]}:
        raise ArtifactError(f"{folder}: weights don't fit the config: {wrong}")
    return model


def read_composition(folder: Path) -> Composition:
    """What the config of a merged folder says. Raises ArtifactError where it isn't one, or of another format."""
    if (folder / BASE_FILE).is_file():
        return read_base_composition(folder)
    config = read_json(folder / "config.json")
    advice = "pull the model again, or merge again"
    refuse_oversized(config, str(folder))
    parts, family = config.get("parts"), config.get("model_type")
    if not isinstance(parts, dict) or family != "finetune_multimodal":
        reader = "vLLM" if family == "finetune_served" else "transformers"
        raise ArtifactError(f"{folder}: a {family!r}, not a model that `finetune merge` wrote; {reader} loads it")
    refuse_format(folder, parts.get("format"), MERGED_FORMAT, "merge")
    try:
        composition = Composition.model_validate(parts)
    except ValidationError as error:
        raise damaged(folder / "config.json", error, advice, "parts.") from None
    placeholders = composition.placeholders.keys()
    if composition.order and {*composition.order} != composition.projectors.keys():
        raise ArtifactError(f"{folder / 'config.json'} is damaged: parts.order names other media; {advice}")
    if not composition.encoders.keys() == composition.projectors.keys() == placeholders <= PLACEHOLDERS.keys():
        raise ArtifactError(
            f"{folder / 'config.json'} is damaged: parts: encoders, projectors and placeholders are for different "
            f"media; {advice}"
        )
    return composition


def load_adapter(
    folder: Path,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    shared_llm: Callable[[Components], Any] | None = None,
) -> Assistant:
    """An adapter folder: the LLM and the encoders are fetched by the names in it. `shared_llm` gives an LLM for these
    components, and may put other encoders of equal weights into them.
    """
    manifest = AdapterManifest.read(folder)
    llm = manifest.model.language_model
    if trust_remote_code and not re.fullmatch(COMMIT, llm.revision or ""):
        raise ArtifactError(f"{folder}: names no commit of {llm.name!r}, so its code isn't run")
    model = manifest.model
    if model.llm is not None:
        model = model.with_language_model(trust_remote_code=trust_remote_code)
    components = load_components(model, manifest.tune_encoders, manifest.seed, device)
    if components.base is None:
        components.tokenizer = load_tokenizer(str(folder))
    language_model = (shared_llm or load_llm)(components)
    composite = build_model(
        components,
        fitted_adapter(folder, language_model),
        seed=manifest.seed,
        bindings=manifest.bindings,
        with_encoders=bool(manifest.tune_encoders),
        language_model=language_model,
    )
    load_trained(composite, folder)
    return Assistant(composite, components.tokenizer, components.placeholders, components.encoders, manifest.media)
