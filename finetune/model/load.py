"""A model from a folder or the Hub."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from finetune.common import certificate, hub
from finetune.common.errors import ArtifactError, ModelError
from finetune.common.progress import quiet_libraries
from finetune.common.registry import part_from
from finetune.common.run_folder import read_json
from finetune.data.media import Limits
from finetune.model import adapter
from finetune.model.assistant import Assistant
from finetune.model.build import Parts, build_model, load_llm, load_parts
from finetune.model.composite import PLACEHOLDERS, MultimodalModel
from finetune.model.language_model import default_device, load_tokenizer
from finetune.model.tokenize import Placeholder

LLM_KEYS = ("name", "revision", "quantize", "double_quantize", "dtype")  # what multimodal.json says of the LLM


def load(
    folder: Path | str,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    *,
    revision: str | None = None,
) -> Assistant:
    """Rebuild a model from a merged folder, an adapter folder, a run (its merged model if there is one), or a Hub id,
    as "user/name", with its branch, tag or commit as `revision`.

    `trust_remote_code` lets an adapter's LLM run code of its Hub repository: the adapter can't ask for it by itself,
    and must name a commit. Raises ArtifactError for a folder that is none of these, or whose files don't fit, and
    ModelError for what the Hub doesn't give.
    """
    quiet_libraries()
    path = Path(folder)
    if not path.exists() and hub.is_repository(str(folder)):
        path = hub.fetched(str(folder), revision)
    elif revision is not None:
        raise ModelError(f"{path}: a revision is for models of the Hub, not for folders")
    else:
        path = next((p for p in (path / "merged", path / "adapter", path) if _is_model(p)), path)
        certificate.verify_if_certified(path)
    if (path / "multimodal.json").is_file():
        return load_adapter(path, device, trust_remote_code)
    if (path / "config.json").is_file():
        return load_merged(path, device)
    raise ArtifactError(
        f"{path}: no merged model, no adapter and no run that has got that far: `finetune train` writes one"
    )


def _is_model(folder: Path) -> bool:
    return (folder / "multimodal.json").is_file() or (folder / "config.json").is_file()


def load_merged(folder: Path, device: torch.device | None = None) -> Assistant:
    """A folder that `merge` wrote: needs nothing but itself."""
    device = device or default_device()
    with hub.reading(folder / "config.json"):
        config = read_json(folder / "config.json")
        parts, family = config.get("parts"), config.get("model_type")
        if not isinstance(parts, dict) or family != "finetune_multimodal":
            reads = "vLLM" if family == "finetune_served" else "transformers"
            raise ArtifactError(f"{folder}: a {family!r}, not a model that `finetune merge` wrote; {reads} loads it")
        refuse_format(folder, parts.get("format", 1), range(1, adapter.MERGED_FORMAT + 1), "merge")
        placeholders = {name: Placeholder(PLACEHOLDERS[name], id) for name, id in parts["placeholders"].items()}
        limits = Limits(**parts["media"])
        hub.verify_weights(folder)
        loaded: Any = MultimodalModel.from_pretrained(folder, dtype="auto", output_loading_info=True)
    model, report = loaded
    wrong = {
        key: sorted(report[key])[:3] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]
    }
    if wrong:
        raise ArtifactError(f"{folder}: weights don't fit the config: {wrong}")
    model = model.to(device).eval()
    if (folder / "generation_config.json").is_file():
        with hub.reading(folder / "generation_config.json"):
            model.language_model.generation_config = GenerationConfig.from_pretrained(folder)
    return Assistant(model, load_tokenizer(str(folder)), placeholders, model.encoder_parts, limits)


def load_adapter(
    folder: Path,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    shared: Callable[[Parts, Mapping[str, Any]], Any] | None = None,
) -> Assistant:
    """An adapter folder: the LLM and the encoders are fetched by the names in it. `shared`, given the parts and the
    LLM's settings, gives the LLM, and may put other encoders of equal weights into the parts.
    """
    with hub.reading(folder / "multimodal.json"):
        content = read_json(folder / "multimodal.json")
        refuse_format(folder, content.get("format"), adapter.READABLE, "train")
        saved = {key: content["language_model"][key] for key in LLM_KEYS}
        kinds = ("encoders", "projectors")
        saved_parts: Any = {kind: {name: part_from(kind, p) for name, p in content[kind].items()} for kind in kinds}
        saved_parts |= {
            "fusion": part_from("fusion", content["fusion"]),
            "tune_encoders": content["tune_encoders"],
        }
        seed, limits, asks = int(content["seed"]), Limits(**content["media"]), adapter.saved_asks(folder)
    llm = {**saved, "attention": "auto", "chat_template": None, "trust_remote_code": trust_remote_code}
    if trust_remote_code and not re.fullmatch("[0-9a-f]{40}", llm["revision"] or ""):
        raise ArtifactError(f"{folder}: names no commit of {llm['name']!r}, so its code isn't run")

    parts = load_parts(llm=llm, **saved_parts, seed=seed, device=device or default_device())
    parts.tokenizer = load_tokenizer(str(folder))
    language_model = (shared or load_llm)(parts, llm)
    model = build_model(
        parts,
        llm=llm,
        adapter_options=adapter.options_for(folder, language_model),
        seed=seed,
        with_encoders=bool(saved_parts["tune_encoders"]),
        asks=asks,
        language_model=language_model,
    )
    adapter.load_trained(model, folder)
    encoders = {name: encoder for name, (_, encoder) in parts.encoders.items()}
    return Assistant(model, parts.tokenizer, parts.placeholders, encoders, limits)


def refuse_format(folder: Path, found: Any, readable: Sequence[int], again: str) -> None:
    """Raises ArtifactError for a format that this version doesn't read; `again`: the verb that writes it anew."""
    if found in readable:
        return
    newer = isinstance(found, int) and found > max(readable)
    advice = "install a newer finetune" if newer else f"{again} again, or install the finetune that wrote it"
    raise ArtifactError(f"{folder}: format {found}; this finetune reads {', '.join(map(str, readable))}: {advice}")
