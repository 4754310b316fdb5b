"""What all encoders share: options, loading a checkpoint of transformers, rebuilding it from settings, fingerprints."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field

from finetune.common.errors import ModelError
from finetune.common.hub import loading
from finetune.common.registry import PartOptions
from finetune.model.bounds import refuse_oversized
from finetune.model.encoders import Encoder, EncoderSettings

if TYPE_CHECKING:
    import torch
    from torch import nn


# Raise this when an encoder prepares or encodes the same medium differently than before.
ENCODING = 1


def checkpoint(models: str) -> Any:
    """The field `name` of an encoder's options, for a checkpoint of these models."""
    return Field(description=f"Hub id or folder of {models}, in safetensors.", json_schema_extra={"path": "maybe"})


class PretrainedOptions(PartOptions):
    """Options of every encoder."""

    name: str = checkpoint("the model")
    revision: str | None = Field(None, description="Commit of the Hub repository, 40 hex digits.")


class LayerOptions(PretrainedOptions):
    """Options of an encoder whose features may come from any layer."""

    layer: int = Field(
        -1, le=-1, description="Layer that gives the features: -1 the last, after the final norm; -2 the one before it."
    )


E = TypeVar("E", bound=Encoder)


def load_auto(options: PretrainedOptions, auto_class: Any) -> Any:
    """The config or processor of a checkpoint, by one of transformers' Auto classes. Raises ModelError."""
    with loading(f"encoder {options.name!r}", options.name) as local_only:
        return auto_class.from_pretrained(options.name, revision=options.revision, local_files_only=local_only)


def load(
    options: PretrainedOptions,
    model_class: Any,
    config: Any,
    dtype: "torch.dtype",
    device: "torch.device",
    key_mapping: dict[str, str] | None = None,
) -> "nn.Module":
    """The weights of a checkpoint, from safetensors only. Weights missing from its files are NaN until `probe` has
    checked whether features depend on them. `key_mapping`: regular expression -> replacement, for names of weights.
    On the meta device, where weights have no data, only the config is read.

    Raises ModelError.
    """
    import torch

    refuse_oversized(config.to_dict(), f"encoder {options.name!r}")
    if device.type == "meta":
        return shapes_of(model_class, config, dtype)
    with loading(f"encoder {options.name!r}", options.name) as local_only:
        module, report = model_class.from_pretrained(
            options.name,
            revision=options.revision,
            config=config,
            dtype=dtype,
            key_mapping=key_mapping,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=local_only,
            adapter_kwargs={"local_files_only": local_only},
        )
    state = module.state_dict()
    for name in report["missing_keys"]:
        if torch.is_floating_point(state[name]):
            state[name].fill_(float("nan"))
    result: nn.Module = module.to(device)
    return result


def shapes_of(model_class: Any, config: Any, dtype: "torch.dtype") -> "nn.Module":
    """A model of a config, on the meta device."""
    import torch
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        built = model_class.from_config(config) if hasattr(model_class, "from_config") else model_class(config)
    module: nn.Module = built.to(dtype)
    return module


def rebuild(settings: EncoderSettings, dtype: "torch.dtype", model_class: Any = None) -> tuple["nn.Module", Any]:
    """(module, processor) from an encoder's settings, frozen; the weights are still to be loaded."""
    import transformers

    config = transformers.AutoConfig.for_model(**settings["config"])
    if model_class is None:
        module = transformers.AutoModel.from_config(config, dtype=dtype)
    else:
        module = model_class(config).to(dtype)
    kind = settings["processor"].get("image_processor_type") or settings["processor"]["feature_extractor_type"]
    return module.eval().requires_grad_(False), getattr(transformers, kind).from_dict(settings["processor"])


def probe(
    name: str, model: str, module: "nn.Module", values: Any, encode: Callable[..., "torch.Tensor"]
) -> "torch.Tensor":
    """Freeze a module, put it into evaluation mode, and return `encode(values[None])[0]`. Missing weights that don't
    change the features (poolers, masks for pretraining) become zero, so that equal files have equal fingerprints.

    Raises ModelError if the module doesn't answer like a `model`, or if the features depend on a missing weight.
    """
    import torch

    module.eval().requires_grad_(False)
    try:
        with torch.no_grad():
            features = encode(values[None])[0]
    except (TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise ModelError(f"encoder {name!r} ({type(module).__name__}) doesn't answer like {model}: {error}") from None
    missing = {key: t for key, t in module.state_dict().items() if t.is_floating_point() and _is_nan(t)}
    if missing and features.isnan().any():
        raise ModelError(
            f"encoder {name!r} can't be loaded: {len(missing)} weights of {type(module).__name__} aren't in its files: "
            + ", ".join(list(missing)[:3])
        )
    for tensor in missing.values():
        tensor.zero_()
    return features


def _is_nan(tensor: "torch.Tensor") -> bool:
    return tensor.device.type != "meta" and bool(tensor.isnan().all())


def measured(encoder: E, width: int) -> E:
    """The encoder with its `width`, and the `fingerprint` that belongs to it."""
    encoder.width = width
    encoder.fingerprint = fingerprint(encoder.module, encoder.settings())
    return encoder


def hidden_states(module: Any, layer: int, **inputs: "torch.Tensor") -> "torch.Tensor":
    """The features of a layer, numbered as in `LayerOptions`."""
    hidden: torch.Tensor
    if layer == -1:
        hidden = module(**inputs).last_hidden_state
    else:
        hidden = module(**inputs, output_hidden_states=True).hidden_states[layer]
    return hidden


def each_segment(
    batch: "torch.Tensor",
    module: "nn.Module",
    run: Callable[["torch.Tensor"], "torch.Tensor"],
    at_once: int = 32,
) -> "torch.Tensor":
    """(N, S, ...) -> (N, S, L, W). `run` gets at most `at_once` segments (n, ...), on the module's device and in its
    dtype, so that memory doesn't grow with the frames of a clip or the length of a recording.
    """
    import torch

    weight = weight_of(module)
    chunks = batch.flatten(0, 1).split(at_once)
    result: torch.Tensor = torch.cat([run(chunk.to(weight.device, weight.dtype)) for chunk in chunks]).unflatten(
        0, batch.shape[:2]
    )
    return result


def weight_of(module: "nn.Module") -> "torch.Tensor":
    """A weight that shows the device and dtype of a module: no vector, since some models (the mask of wav2vec 2.0)
    create vectors on the CPU whatever the device.
    """
    return next(parameter for parameter in module.parameters() if parameter.ndim > 1)


def fingerprint(module: "nn.Module", settings: EncoderSettings) -> str:
    """sha256 of weights, preprocessing and options: equal fingerprints mean equal features. Where the weights were
    loaded from, and which other weights were there, has no influence.
    """
    options = {key: value for key, value in settings["options"].items() if key not in ("name", "revision")}
    origin = ("_name_or_path", "architectures", "dtype")  # the dtype is hashed with each weight
    config = {key: value for key, value in settings["config"].items() if key not in origin}
    digest = hashlib.sha256(f"{ENCODING}".encode())
    content = {**settings, "options": options, "config": config}
    digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    hash_tensors(digest, module.state_dict())
    return digest.hexdigest()


def hash_tensors(digest: Any, tensors: Mapping[str, "torch.Tensor"]) -> None:
    """Add names, dtypes, shapes and values, these unless on the meta device."""
    import torch

    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.device.type != "meta":
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
