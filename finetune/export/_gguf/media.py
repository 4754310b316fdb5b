"""Encoders and projectors as the second file that llama.cpp reads beside the LLM's, its `mmproj`.

llama.cpp has one fixed graph for each type of projector, with its own preprocessing, and most put tokens around the
media. Here are those that give what the composite gives, to rounding: SigLIP with `mlp` or `linear`, Whisper with
`stack`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.common.errors import ExportRefused
from finetune.common.registry import part_from
from finetune.model.composite import MultimodalModel

BICUBIC = 3  # Pillow's number; llama.cpp resizes as Pillow does, to the bit
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "quick_gelu": "", "silu": "silu"}
# What llama.cpp's own projectors of these kinds write as text around each medium.
AROUND = {
    ("vision", "pixel_shuffle"): "<img> and </img>",
    ("whisper", "linear"): "<|audio_bos|> and <|audio_eos|>",
    ("whisper", "mlp"): "<sound>",
}
FRAMES = 3000  # of 30 seconds, to which llama.cpp fills every recording up

SIGLIP_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
WHISPER_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "self_attn_layer_norm": "ln1",
    "final_layer_norm": "ln2",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
}


@dataclass(frozen=True)
class Reader:
    """What llama.cpp needs to read one kind of media: keys below `clip.`, and tensors by its names."""

    projector_type: str
    keys: dict[str, Any]
    tensors: dict[str, Tensor]


def readers_of(model: MultimodalModel) -> dict[str, Reader]:
    """{"image": ..., "audio": ...} of what the composite takes.

    Raises ExportRefused where llama.cpp doesn't do the same.
    """
    parts = model.config.parts
    require(parts["fusion"]["kind"] == "prefix", f"llama.cpp has no fusion {parts['fusion']['kind']!r}, only 'prefix'")
    require(not model.heads, f"llama.cpp only writes text, but {', '.join(model.heads)} is answered by a head")
    found = {}
    for name, encoder in model.encoder_parts.items():
        kind, (projector, options) = (
            parts["encoders"][name]["kind"],
            part_from("projectors", parts["projectors"][name]),
        )
        make = MAKERS.get((kind, projector))
        there = ", ".join(f"{one} with {other}" for one, other in MAKERS)
        why = (
            f" (it puts {AROUND[kind, projector]} around them, unlike in training)"
            if (kind, projector) in AROUND
            else ""
        )
        require(make is not None, f"llama.cpp can't read {name} by {kind} with {projector}{why}; it can by {there}")
        found[name] = make(encoder, options, model.projectors[name].state_dict())  # type: ignore[misc]
    return found


def require(fits: bool, reason: str) -> None:
    if not fits:
        raise ExportRefused(f"gguf: {reason}. `--to transformers` holds every model")


def _siglip_mlp(encoder: Any, options: Any, projector: dict[str, Tensor]) -> Reader:
    return _siglip(encoder, {**_pair("mm.0", projector, "0"), **_pair("mm.2", projector, "2")})


def _siglip_linear(encoder: Any, options: Any, projector: dict[str, Tensor]) -> Reader:
    """As linear, GELU, linear: x is GELU(x) - GELU(-x)."""
    weight, bias = projector["weight"].float(), projector["bias"].float()
    one = torch.eye(len(bias), device=bias.device)
    first = {"mm.0.weight": torch.cat([weight, -weight]), "mm.0.bias": torch.cat([bias, -bias])}
    return _siglip(encoder, first | {"mm.2.weight": torch.cat([one, -one], 1), "mm.2.bias": 0 * bias})


def _siglip(encoder: Any, projector: dict[str, Tensor]) -> Reader:
    """llama.cpp's `mlp`: patches, layers, the last norm where there is one, linear, GELU, linear."""
    config, shape, layer = encoder.module.config, encoder.shape, encoder.options.layer
    family = config.model_type
    require(
        family == "siglip_vision_model",
        f"of vision backbones llama.cpp reads only SigLIP as it is, not {family}"
        + (": it mistakes the last patch for the class token" if shape.skipped else ""),
    )
    require(encoder.options.tiles == 1, "llama.cpp doesn't cut a picture into tiles as `tiles` does")
    require(config.hidden_act in ACTIVATIONS, f"llama.cpp has no activation {config.hidden_act!r} in its layers")
    require(shape.height == shape.width == config.image_size, f"pictures must be squares of {config.image_size} pixels")
    _require_stretching(encoder.processor.to_dict())
    layers = config.num_hidden_layers + 1 + layer if layer < -1 else config.num_hidden_layers
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
        "feature_layer": [layers],  # else the last one is left out
        # A grid of no tiles: the picture is stretched to the square as SigLIP does it, instead of being padded.
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
    return Reader("mlp", _named("vision", keys) | ({f"clip.use_{use}": True} if use else {}), tensors)


def _require_stretching(processor: dict[str, Any]) -> None:
    """Pictures must become squares as llama.cpp makes them so."""
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


def _whisper(encoder: Any, options: Any, projector: dict[str, Tensor]) -> Reader:
    """llama.cpp's `ultravox`, which puts no tokens around the sound: layers, the last norm, rows stacked, SwiGLU."""
    config, layer = encoder.module.config, encoder.options.layer
    require(
        encoder.options.pad_to_30_seconds and encoder.options.window_seconds == 30,
        "llama.cpp fills every recording up to 30 seconds: train with `pad_to_30_seconds: true`, `window_seconds: 30`",
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
    layers = config.encoder_layers + 1 + layer if layer < -1 else config.encoder_layers
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
    return Reader("ultravox", _named("audio", keys), tensors)


def _stacks_alike(width: int, factor: int) -> bool:
    """Whether llama.cpp's arithmetic, exact for powers of two, gives as many rows as `stack` does."""
    rows, wide = FRAMES // 2, width * factor
    padded = (rows * width + wide - 1) & ~(wide - 1)
    told = ceil(FRAMES / factor) // 2
    return padded >= rows * width and padded // wide == told == ceil(rows / factor)


MAKERS: dict[tuple[str, str], Callable[[Any, Any, dict[str, Tensor]], Reader]] = {
    ("vision", "mlp"): _siglip_mlp,
    ("vision", "linear"): _siglip_linear,
    ("whisper", "stack"): _whisper,
}


def _named(modality: str, keys: dict[str, Any]) -> dict[str, Any]:
    return {f"clip.{modality}.{name}": value for name, value in keys.items()}


def _pair(name: str, state: dict[str, Tensor], module: str) -> dict[str, Tensor]:
    """Weight and bias, where there is one."""
    return {f"{name}.{kind}": state[f"{module}.{kind}"] for kind in ("weight", "bias") if f"{module}.{kind}" in state}


def _layers(
    prefix: str, state: dict[str, Tensor], module: str, names: dict[str, str], count: int
) -> Iterator[tuple[str, Tensor]]:
    for number in range(count):
        for theirs, name in names.items():
            yield from _pair(f"{prefix}.blk.{number}.{name}", state, f"{module}.{number}.{theirs}").items()


def write_media(readers: dict[str, Reader], path: Path, *, half: bool) -> None:
    """One file of all readers. `half`: matrices in 16 bit."""
    import gguf

    names = {"image": "vision", "audio": "audio"}
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_string("general.type", "mmproj")
    writer.add_uint32("general.file_type", int(half))
    for kind, reader in readers.items():
        writer.add_bool(f"clip.has_{names[kind]}_encoder", True)
        writer.add_string(f"clip.{names[kind]}.projector_type", reader.projector_type)
        for key, value in reader.keys.items():
            add_key(writer, key, value)
        for name, tensor in reader.tensors.items():
            # llama.cpp's convolution over time takes its kernel in 16 bit only; norms and biases stay in 32.
            kernel = ".conv1d." in name and name.endswith(".weight")
            matrix = tensor.ndim > 1 and name.endswith(".weight") and "position_embd" not in name
            dtype = np.float16 if kernel or (half and matrix) else np.float32
            writer.add_tensor(name, np.ascontiguousarray(tensor.detach().cpu().float().numpy().astype(dtype)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_key(writer: Any, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    add[type(value)](key, value)
