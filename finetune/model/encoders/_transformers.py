"""What the encoders share: loading a checkpoint of transformers, rebuilding one from settings, fingerprints."""

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from finetune.common.errors import ModelError
from finetune.common.registry import PartOptions

if TYPE_CHECKING:
    import torch


# Whoever changes what an encoder prepares or gives for the same medium raises this.
ENCODING = 1


def load(model_class: Any, config: Any, options: Any, dtype: "torch.dtype", **keywords: Any) -> "torch.nn.Module":
    """Weights of `options.name`, from safetensors only. What the files lack is NaN until `probe` has judged it.

    Raises what transformers raises: to be called inside `finetune.common.hub.loading`.
    """
    import torch

    module, report = model_class.from_pretrained(
        options.name,
        revision=options.revision,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        **keywords,
    )
    state = module.state_dict()
    for name in report["missing_keys"]:
        if torch.is_floating_point(state[name]):
            state[name].fill_(float("nan"))
    return module.eval().requires_grad_(False)


def probe(
    name: str, like: str, module: "torch.nn.Module", values: "torch.Tensor", encode: Callable[..., "torch.Tensor"]
) -> "torch.Tensor":
    """What a module that has just been loaded answers: `encode(values[None])[0]`. Weights that its files lack must not
    matter (poolers, masks for pretraining): they become zero, so that equal files have equal fingerprints.

    Raises ModelError where it doesn't answer `like` what it should be, or where a weight that matters is missing.
    """
    import torch

    try:
        with torch.no_grad():
            features = encode(values[None])[0]
    except (TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise ModelError(f"encoder {name!r} ({type(module).__name__}) doesn't answer like {like}: {error}") from None
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


def each_segment(
    batch: "torch.Tensor",
    module: "torch.nn.Module",
    run: Callable[["torch.Tensor"], "torch.Tensor"],
    at_once: int = 32,
) -> "torch.Tensor":
    """(N, S, ...) -> (N, S, L, W): `run` gets (at most `at_once`, ...) on the module's device, in its dtype. A clip of
    256 frames or an hour of speech needs no more memory than `at_once` of them.
    """
    import torch

    weight = weight_of(module)
    parts = batch.flatten(0, 1).split(at_once)
    return torch.cat([run(part.to(weight.device, weight.dtype)) for part in parts]).unflatten(0, batch.shape[:2])


def weight_of(module: "torch.nn.Module") -> "torch.Tensor":
    """A weight, for the device and dtype that the module takes: not a vector, some of which (the mask of wav2vec 2.0)
    are made on the CPU whatever device was asked for.
    """
    return next(parameter for parameter in module.parameters() if parameter.ndim > 1)


def settings(module: Any, processor: Any, options: PartOptions) -> dict[str, Any]:
    """All that rebuilding needs besides the weights, as JSON."""
    return {
        "options": options.model_dump(),
        "config": json.loads(module.config.to_json_string(use_diff=False)),
        "processor": json.loads(processor.to_json_string()),
    }


def rebuild(saved: dict[str, Any], dtype: "torch.dtype", model_class: Any = None) -> tuple["torch.nn.Module", Any]:
    """(module, processor) from `settings`, frozen, its weights still to be loaded."""
    import transformers

    rest = {key: value for key, value in saved["config"].items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(saved["config"]["model_type"], **rest)
    if model_class is None:
        module = transformers.AutoModel.from_config(config, dtype=dtype)
    else:
        module = model_class(config).to(dtype)
    kind = saved["processor"].get("image_processor_type") or saved["processor"]["feature_extractor_type"]
    return module.eval().requires_grad_(False), getattr(transformers, kind).from_dict(saved["processor"])


def fingerprint(module: "torch.nn.Module", saved: dict[str, Any]) -> str:
    """sha256 over weights, preprocessing and options: equal fingerprints give equal features. Where the weights came
    from, and what stood around them there, doesn't matter.
    """
    import torch

    options = {key: value for key, value in saved["options"].items() if key not in ("name", "revision")}
    origin = ("_name_or_path", "architectures", "dtype")  # the weights tell their dtype
    config = {key: value for key, value in saved["config"].items() if key not in origin}
    digest = hashlib.sha256(f"{ENCODING}".encode())
    digest.update(json.dumps(saved | {"options": options, "config": config}, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.device.type != "meta":
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
