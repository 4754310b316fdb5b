"""A pooled Whisper against the encoder of Qwen2-Audio, which averages two rows before the last norm."""

import pytest
import torch
import transformers
from tiny_encoders import tiny_encoder_folder, tiny_sound

from finetune.model.encoders import whisper

CPU = torch.device("cpu")


def pooled(folder, **options) -> whisper.Encoder:
    return whisper.build(whisper.Options(name=str(folder), pool=2, **options), torch.float32, CPU)


def test_it_gives_what_qwen2_audio_s_own_encoder_gives(tmp_path):
    encoder = pooled(tiny_encoder_folder(tmp_path, "whisper"), pad_to_30_seconds=True)
    own = encoder.module.config
    config = transformers.Qwen2AudioEncoderConfig(
        **{name: getattr(own, name) for name in ("d_model", "encoder_layers", "encoder_attention_heads")},
        encoder_ffn_dim=own.encoder_ffn_dim,
        num_mel_bins=own.num_mel_bins,
        max_source_positions=own.max_source_positions,
    )
    other = transformers.AutoModel.from_config(config).eval()
    other.load_state_dict(encoder.module.state_dict())
    prepared = encoder.prepare(tiny_sound())
    with torch.no_grad():
        expected = other(prepared.values).last_hidden_state
        features = encoder.encode(prepared.values[None])[0]
    assert features.shape[1] == prepared.layout.rows == own.max_source_positions // 2
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seconds", [0.01, 0.5, 1.23])
def test_its_rows_are_half_as_many_and_known_beforehand(tmp_path, seconds):
    encoder = pooled(tiny_encoder_folder(tmp_path, "whisper"))
    prepared = encoder.prepare(tiny_sound()[: int(seconds * 16_000)])
    with torch.no_grad():
        assert encoder.encode(prepared.values[None])[0].shape[1] == prepared.layout.rows
