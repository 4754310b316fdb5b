"""Random encoders of every kind, small enough for tests: built in code, nothing fetched."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tiny import BACKBONES, VIT, tiny_backbone, tiny_picture
from torch import nn

from finetune.common.registry import load_part

Built = tuple[nn.Module, nn.Module, Any]  # the model as it is published, the tower that is read, its processor
LAYERS = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
WAVE = LAYERS | {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
WAVE |= {"vocab_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAKE = 0.1  # fresh biases and class tokens are zero: too small for a leak to show


def _shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(SHAKE * torch.randn_like(parameter))
    return model.eval()


def _whisper() -> Built:
    config = transformers.WhisperConfig(
        vocab_size=8,
        d_model=16,
        num_mel_bins=8,
        max_target_positions=8,
        encoder_layers=3,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = _shaken(transformers.WhisperForConditionalGeneration(config))
    return model, model.model.encoder, transformers.WhisperFeatureExtractor(feature_size=8)


def _wave(family: str, normalise: bool = True, **changes: Any) -> Built:
    config = transformers.AutoConfig.for_model(family, **(WAVE | changes))
    model = _shaken(transformers.AutoModelForCTC.from_config(config))
    return model, model.base_model, transformers.Wav2Vec2FeatureExtractor(do_normalize=normalise)


def _ast() -> Built:
    config = transformers.ASTConfig(**LAYERS, max_length=128, num_mel_bins=32)
    model = _shaken(transformers.ASTForAudioClassification(config))
    return model, model.base_model, transformers.ASTFeatureExtractor(max_length=128, num_mel_bins=32)


def _clap(fused: bool = False) -> Built:
    text = LAYERS | {"vocab_size": 8, "projection_dim": 8}
    audio = {"spec_size": 64, "num_mel_bins": 16, "patch_embeds_hidden_size": 8, "hidden_size": 32, "window_size": 4}
    audio |= {"depths": [1, 1, 1], "num_attention_heads": [2, 2, 2], "projection_dim": 8, "enable_fusion": fused}
    audio |= {"fusion_type": "aff_2d"} if fused else {}
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=8)
    model = _shaken(transformers.ClapModel(config))
    extractor = transformers.ClapFeatureExtractor(
        feature_size=16, hop_length=2400, truncation="fusion" if fused else "rand_trunc"
    )
    return model, model.audio_model, extractor


def _backbone(kind: str) -> Built:
    module, processor = tiny_backbone(kind)
    return module, module, processor


def _frame_processor() -> Any:
    return transformers.VideoMAEImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})


def _videomae() -> Built:
    config = transformers.VideoMAEConfig(**LAYERS, image_size=32, patch_size=8, num_frames=4, tubelet_size=2)
    model = _shaken(transformers.VideoMAEForVideoClassification(config))
    return model, model.base_model, _frame_processor()


def _vjepa2() -> Built:
    config = transformers.VJEPA2Config(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        mlp_ratio=2.0,
        pred_hidden_size=24,
        pred_num_hidden_layers=1,
        pred_num_attention_heads=2,
        crop_size=32,
        patch_size=8,
        frames_per_clip=4,
        tubelet_size=2,
        pred_num_mask_tokens=1,
    )
    model = _shaken(transformers.VJEPA2Model(config))
    return model, model, _frame_processor()


# label: (kind of encoder, what builds it)
KINDS: dict[str, tuple[str, Callable[[], Built]]] = {
    **{kind: ("vision", lambda kind=kind: _backbone(kind)) for kind in BACKBONES},
    "whisper": ("whisper", _whisper),
    "wav2vec2": ("wave", lambda: _wave("wav2vec2", feat_extract_norm="group")),
    "wav2vec2_large": ("wave", lambda: _wave("wav2vec2", feat_extract_norm="layer", do_stable_layer_norm=True)),
    "wav2vec2_adapter": ("wave", lambda: _wave("wav2vec2", add_adapter=True, num_adapter_layers=2)),
    "hubert": ("wave", lambda: _wave("hubert", normalise=False)),
    "wavlm": ("wave", lambda: _wave("wavlm", num_ctc_classes=8)),
    "data2vec-audio": ("wave", lambda: _wave("data2vec-audio", num_conv_pos_embeddings=2, conv_pos_kernel_size=3)),
    "ast": ("spectrogram", _ast),
    "clap": ("spectrogram", _clap),
    "clap_fused": ("spectrogram", lambda: _clap(fused=True)),
    "siglip_frames": ("video", lambda: _backbone("siglip")),
    "mobilenet_v2_frames": ("video", lambda: _backbone("mobilenet_v2")),
    "videomae": ("video_transformer", _videomae),
    "vjepa2": ("video_transformer", _vjepa2),
}


def medium_of(label: str) -> str:
    """'image', 'audio' or 'video'."""
    return load_part("encoders", KINDS[label][0]).MEDIUM


def tiny_encoder_of(label: str, seed: int = 1, **options: Any) -> Any:
    """An Encoder of one of KINDS; equal seeds, equal weights."""
    part = load_part("encoders", KINDS[label][0])
    torch.manual_seed(seed)
    _, tower, processor = KINDS[label][1]()
    return part.wrap(tower, processor, part.Options(name="tiny", **options))


def tiny_encoder_folder(folder: Path, label: str, seed: int = 1) -> Path:
    """The folder of a whole model as it is published: with decoder, head or text tower."""
    torch.manual_seed(seed)
    model, _, processor = KINDS[label][1]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if label == "vjepa2":  # its processor's class needs torchvision, its file stands beside the weights all the same
        figures = json.loads((folder / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").unlink()
        figures = {key: value for key, value in figures.items() if key != "image_processor_type"}
        figures["video_processor_type"] = "VJEPA2VideoProcessor"
        (folder / "video_preprocessor_config.json").write_text(json.dumps(figures))
    return folder


def tiny_audio_folder(folder: Path, label: str = "whisper") -> Path:
    return tiny_encoder_folder(folder, label)


def tiny_video_folder(folder: Path, label: str = "siglip_frames") -> Path:
    return tiny_encoder_folder(folder, label)


def tiny_sound(seconds: float = 1.37, seed: int = 0) -> np.ndarray:
    """Float32 samples at 16 kHz: two tones and noise, within [-1, 1]."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * 16_000)) / 16_000
    tones = 0.3 * np.sin(2 * np.pi * 220 * (seed + 1) * time) + 0.2 * np.sin(2 * np.pi * 1700 * time)
    return (tones + 0.05 * random.standard_normal(len(time))).clip(-1, 1).astype(np.float32)


def tiny_clip(frames: int = 3, size: tuple[int, int] = (40, 30), seed: int = 0) -> Any:
    """A clip of `frames` pictures, each of its own colour, half a second apart."""
    from finetune.data.media.video import Clip

    pictures = tuple(tiny_picture((20 * number % 256, 40 * seed % 256, 120), size) for number in range(frames))
    return Clip(pictures, tuple(0.5 * number for number in range(frames)))


def tiny_medium(label: str, seed: int = 0) -> Any:
    """A decoded medium that the encoder takes; of the same size for every seed."""
    medium = medium_of(label)
    if medium == "image":
        return tiny_picture((60 * seed % 256, 90, 200))
    return tiny_sound(seed=seed) if medium == "audio" else tiny_clip(seed=seed)


def save_siglips_of_6x6(folder: Path) -> None:
    """Encoders `image` and `video` of 6×6 patches, where 2 and 3 must divide."""
    torch.manual_seed(1)
    config = transformers.SiglipVisionConfig(**(VIT | {"image_size": 48}))
    for medium in ("image", "video"):
        transformers.SiglipVisionModel(config).save_pretrained(folder / medium)
        transformers.SiglipImageProcessor(size={"height": 48, "width": 48}).save_pretrained(folder / medium)
