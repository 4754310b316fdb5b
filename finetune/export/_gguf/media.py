"""Encoders and projectors as `mmproj`, the second file that llama.cpp reads.

llama.cpp has a fixed graph with its own preprocessing for each type of projector, and most put tokens around the media.
This file has those that equal the composite up to rounding: SigLIP with `mlp` or `linear`, Whisper with `stack`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.common.errors import ExportRefused
from finetune.model.composite import MultimodalModel

GgufValue = bool | int | float | str | Sequence[int] | Sequence[float]

BICUBIC = 3  # Pillow's constant; llama.cpp resizes bit for bit like Pillow
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "quick_gelu": "", "silu": "silu"}
# The text that llama.cpp's own projectors of these kinds put around each medium.
ADDED_TEXT = {
    ("vision", "pixel_shuffle"): "<img> and </img>",
    ("whisper", "linear"): "<|audio_bos|> and <|audio_eos|>",
    ("whisper", "mlp"): "<sound>",
}
FRAMES = 3000  # of 30 seconds, to which llama.cpp pads every recording

ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
}
SIGLIP_LAYER = ATTENTION | {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
WHISPER_LAYER = ATTENTION | {
    "self_attn_layer_norm": "ln1",
    "final_layer_norm": "ln2",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
}


@dataclass(frozen=True)
class MediaModel:
    """An encoder with its projector in llama.cpp's form: `keys` by their full names, tensors by llama.cpp's names."""

    projector_type: str
    keys: Mapping[str, GgufValue]
    tensors: Mapping[str, Tensor]


def media_models(model: MultimodalModel) -> dict[str, MediaModel]:
    """{"image": ..., "audio": ...} for the media that the composite takes.

    Raises ExportRefused if llama.cpp computes something else.
    """
    composition = model.composition
    fusion = composition.fusion.kind
    require(fusion == "prefix", f"llama.cpp has no fusion {fusion!r}, only 'prefix'")
    require(not model.heads, f"llama.cpp only writes text, but {', '.join(model.heads)} is answered by a head")
    models = {}
    for name, encoder in model.encoder_parts.items():
        projector = composition.projectors[name].part
        pair = (composition.encoders[name].kind, projector.kind)
        if pair not in BUILDERS:
            supported = ", ".join(" with ".join(known) for known in BUILDERS)
            added = f" (it puts {ADDED_TEXT[pair]} around them, unlike in training)" if pair in ADDED_TEXT else ""
            require(False, f"llama.cpp can't read {name} by {' with '.join(pair)}{added}; it supports {supported}")
        models[name] = BUILDERS[pair](encoder, projector.options, model.projectors[name].state_dict())
    return models


def require(fits: bool, reason: str) -> None:
    if not fits:
        raise ExportRefused(f"gguf: {reason}. The target `transformers` takes every model")


def _siglip_mlp(encoder: Any, options: Any, projector: dict[str, Tensor]) -> MediaModel:
    return _siglip(encoder, {**_pair("mm.0", projector, "0"), **_pair("mm.2", projector, "2")})


def _siglip_linear(encoder: Any, options: Any, projector: dict[str, Tensor]) -> MediaModel:
    """Written as linear, GELU, linear: x = GELU(x) - GELU(-x)."""
    weight, bias = projector["weight"].float(), projector["bias"].float()
    one = torch.eye(len(bias), device=bias.device)
    first = {"mm.0.weight": torch.cat([weight, -weight]), "mm.0.bias": torch.cat([bias, -bias])}
    return _siglip(encoder, first | {"mm.2.weight": torch.cat([one, -one], 1), "mm.2.bias": 0 * bias})


def _siglip(encoder: Any, projector: dict[str, Tensor]) -> MediaModel:
    """llama.cpp's `mlp`: patches, layers, the last norm if the features have it, linear, GELU, linear."""
    config, shape, layer = encoder.module.config, encoder.shape, encoder.options.layer
    family = config.model_type
    require(
        family == "siglip_vision_model",
        f"of vision backbones llama.cpp reads only SigLIP unchanged, not {family}"
        + (": it takes the last patch for the class token" if shape.skipped else ""),
    )
    require(encoder.options.tiles == 1, "llama.cpp doesn't cut a picture into tiles as `tiles` does")
    require(config.hidden_act in ACTIVATIONS, f"llama.cpp has no activation {config.hidden_act!r} in its layers")
    require(shape.height == shape.width == config.image_size, f"pictures must be squares of {config.image_size} pixels")
    _require_stretching(encoder.processor.to_dict())
    layers = config.num_hidden_layers + 1 + layer
    require(layers > 0, f"`layer: {layer}` leaves no layer")
    keys = {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "projection_dim": len(projector["mm.2.bias"]),
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_epsilon": float(config.layer_norm_eps),
        "block_count": layers,
        "feature_layer": [layers],  # without it the last layer is left out
        # A grid without tiles: the picture is stretched to a square as for SigLIP, instead of being padded.
        "image_grid_pinpoints": [0, 0],
        "image_mean": [float(value) for value in encoder.processor.image_mean],
        "image_std": [float(value) for value in encoder.processor.image_std],
    }
    state = {name.removeprefix("vision_model."): tensor for name, tensor in encoder.module.state_dict().items()}
    tensors = {
        "v.patch_embd.weight": state["embeddings.patch_embedding.weight"],
        "v.patch_embd.bias": state["embeddings.patch_embedding.bias"],
        "v.position_embd.weight": state["embeddings.position_embedding.weight"],
        **dict(_layers("v", state, "encoder.layers", SIGLIP_LAYER, layers)),
        **(_pair("v.post_ln", state, "post_layernorm") if layer == -1 else {}),
        **projector,
    }
    use = ACTIVATIONS[config.hidden_act]
    return MediaModel("mlp", _full_names("vision", keys) | ({f"clip.use_{use}": True} if use else {}), tensors)


def _require_stretching(processor: dict[str, Any]) -> None:
    """Raises ExportRefused unless pictures become squares as in llama.cpp."""
    size = dict(processor.get("size") or {})
    stretches = size.keys() == {"height", "width"} and not processor.get("do_center_crop")
    require(stretches, f"llama.cpp stretches pictures to a square; this model's processor crops or pads them ({size})")
    require(
        processor.get("resample") == BICUBIC,
        f"llama.cpp resizes pictures bicubically, this model's processor by method {processor.get('resample')}",
    )
    plain = all(processor.get(step, True) for step in ("do_resize", "do_rescale", "do_normalize"))
    require(
        plain and abs(processor.get("rescale_factor", 0) * 255 - 1) < 1e-6,
        "llama.cpp resizes, divides by 255 and normalizes; this model's processor leaves one of these out",
    )


def _whisper(encoder: Any, options: Any, projector: dict[str, Tensor]) -> MediaModel:
    """llama.cpp's `ultravox`, which puts no tokens around the sound: layers, the last norm, rows stacked, SwiGLU."""
    config, layer = encoder.module.config, encoder.options.layer
    require(
        encoder.options.pad_to_30_seconds and encoder.options.window_seconds == 30,
        "llama.cpp pads every recording to 30 seconds: train with `pad_to_30_seconds: true`, `window_seconds: 30`",
    )
    require(encoder.options.pool == 1, "llama.cpp doesn't average rows (`pool`) where `stack` joins them")
    rows = config.max_source_positions
    require(rows == FRAMES // 2, f"llama.cpp reads Whispers of 1500 rows, this one has {rows}")
    require(config.activation_function == "gelu", f"llama.cpp has no Whisper with {config.activation_function!r}")
    processor = encoder.processor
    require(
        (processor.n_fft, processor.hop_length, processor.sampling_rate) == (400, 160, 16_000),
        "llama.cpp makes Whisper's frames of 400 samples every 160 at 16 kHz; this model's processor doesn't",
    )
    factors = [factor for factor in range(1, 17) if _stacks_alike(config.d_model, factor)]
    require(
        options.factor in factors,
        f"llama.cpp drops a row where `stack` joins {options.factor}; with this encoder it doesn't for factors "
        f"{', '.join(map(str, factors))}",
    )
    layers = config.encoder_layers + 1 + layer
    require(layers > 0, f"`layer: {layer}` leaves no layer")
    keys = {
        "num_mel_bins": config.num_mel_bins,
        "embedding_length": config.d_model,
        "feed_forward_length": config.encoder_ffn_dim,
        "projection_dim": projector["5.weight"].shape[0],
        "attention.head_count": config.encoder_attention_heads,
        "attention.layer_norm_epsilon": 1e-5,
        "block_count": layers,
        "projector.stack_factor": options.factor,
    }
    state = encoder.module.state_dict()
    tensors = {
        **{f"a.conv1d.{n}.weight": state[f"conv{n}.weight"] for n in (1, 2)},
        **{f"a.conv1d.{n}.bias": state[f"conv{n}.bias"][:, None] for n in (1, 2)},
        "a.position_embd.weight": state["embed_positions.weight"],
        **dict(_layers("a", state, "layers", WHISPER_LAYER, layers)),
        **(_pair("a.post_ln", state, "layer_norm") if layer == -1 else {}),
        "mm.a.norm_pre.weight": projector["1.weight"],
        "mm.a.mlp.1.weight": projector["2.weight"],
        "mm.a.norm_mid.weight": projector["4.weight"],
        "mm.a.mlp.2.weight": projector["5.weight"],
    }
    return MediaModel("ultravox", _full_names("audio", keys), tensors)


def _stacks_alike(width: int, factor: int) -> bool:
    """Whether llama.cpp's arithmetic, exact for powers of two, gives as many rows as `stack`."""
    rows, wide = FRAMES // 2, width * factor
    padded = (rows * width + wide - 1) & ~(wide - 1)
    return padded >= rows * width and padded // wide == ceil(FRAMES / factor) // 2 == ceil(rows / factor)


# {(encoder, projector): function of the encoder, the projector's options and its weights}
BUILDERS: dict[tuple[str, str], Callable[[Any, Any, dict[str, Tensor]], MediaModel]] = {
    ("vision", "mlp"): _siglip_mlp,
    ("vision", "linear"): _siglip_linear,
    ("whisper", "stack"): _whisper,
}


def _full_names(modality: str, keys: Mapping[str, GgufValue]) -> dict[str, GgufValue]:
    return {f"clip.{modality}.{name}": value for name, value in keys.items()}


def _pair(name: str, state: dict[str, Tensor], module: str) -> dict[str, Tensor]:
    """A module's weight, and its bias if it has one."""
    return {f"{name}.{kind}": state[f"{module}.{kind}"] for kind in ("weight", "bias") if f"{module}.{kind}" in state}


def _layers(
    prefix: str, state: dict[str, Tensor], module: str, names: dict[str, str], count: int
) -> Iterator[tuple[str, Tensor]]:
    for number in range(count):
        for theirs, name in names.items():
            yield from _pair(f"{prefix}.blk.{number}.{name}", state, f"{module}.{number}.{theirs}").items()


def write_media(models: Mapping[str, MediaModel], path: Path, *, half: bool) -> None:
    """Write all of them into one file. `half`: matrices in 16 bit."""
    import gguf

    writer = gguf.GGUFWriter(path, "clip")
    writer.add_string("general.type", "mmproj")
    writer.add_uint32("general.file_type", int(half))
    for kind, model in models.items():
        modality = "vision" if kind == "image" else kind
        writer.add_bool(f"clip.has_{modality}_encoder", True)
        writer.add_string(f"clip.{modality}.projector_type", model.projector_type)
        for key, value in model.keys.items():
            add_key(writer, key, value)
        for name, tensor in model.tensors.items():
            # llama.cpp's convolution over time takes its kernel in 16 bit only; norms and biases stay in 32 bit.
            kernel = ".conv1d." in name and name.endswith(".weight")
            matrix = tensor.ndim > 1 and name.endswith(".weight") and "position_embd" not in name
            dtype = np.float16 if kernel or (half and matrix) else np.float32
            writer.add_tensor(name, np.ascontiguousarray(tensor.detach().cpu().float().numpy().astype(dtype)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_key(writer: Any, key: str, value: GgufValue) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    add[type(value)](key, value)
