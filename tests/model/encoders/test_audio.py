"""Whisper, wave and spectrogram encoders against transformers' own features and forward passes."""

import copy

import numpy as np
import pytest
import torch
import transformers
from tiny_encoders import tiny_encoder_folder, tiny_encoder_of, tiny_sound
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from finetune.common.errors import ModelError
from finetune.model.encoders import spectrogram, wave, whisper
from finetune.model.encoders._audio import cut_windows, resampled, window_sizes

pytestmark = pytest.mark.slow

RATE = 16_000


def encode(encoder, values: torch.Tensor) -> torch.Tensor:
    """Values (S, ...) of one recording -> features (S, L, W)."""
    with torch.no_grad():
        return encoder.encode(values[None])[0]


# Windows


@pytest.mark.parametrize("samples", [0, 1, 319, 320, 479_999, 480_000, 480_001, 960_000, 9_600_123])
@pytest.mark.parametrize("unit", [1, 320])
def test_windows_are_few_and_equal_and_none_is_too_long(samples, unit):
    longest = 480_000
    windows, size = window_sizes(samples, longest, unit)
    assert size <= longest and size % unit == 0
    assert windows * size >= samples  # nothing is lost
    assert windows * size - samples < max(windows * unit, unit + 1)  # hardly anything is added
    assert (windows - 1) * longest < max(samples, unit)  # one fewer wouldn't hold it


def test_windows_hold_the_recording_in_order():
    audio = np.arange(1, 1001, dtype=np.float32)
    windows = cut_windows(audio, 300, unit=7)
    assert windows.shape == (4, 252)
    assert np.array_equal(windows.reshape(-1)[:1000], audio) and not windows.reshape(-1)[1000:].any()


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_resampling_keeps_the_pitch_and_the_loudness(rate):
    time = np.arange(RATE) / RATE
    sound = resampled(np.sin(2 * np.pi * 440 * time).astype(np.float32), rate)
    assert sound.dtype == np.float32 and abs(len(sound) - rate) <= 1
    middle = slice(rate // 4, 3 * rate // 4)
    expected = np.sin(2 * np.pi * 440 * np.arange(len(sound)) / rate)
    np.testing.assert_allclose(sound[middle], expected[middle], atol=1e-3)


# Whisper


@pytest.mark.parametrize("seconds", [0.0001, 0.1, 1.37, 29.9999, 30.0])
def test_whisper_s_frames_are_those_of_its_own_extractor_without_the_silence_behind(seconds):
    encoder, sound = tiny_encoder_of("whisper"), tiny_sound(seconds)
    own = encoder.processor(sound, sampling_rate=RATE, return_tensors="pt")["input_features"]
    prepared = encoder.prepare(sound)
    frames = prepared.values.shape[-1]
    assert frames == 2 * prepared.layout.rows and 0 <= frames - len(sound) / 160 < 2
    torch.testing.assert_close(prepared.values, own[..., :frames], atol=1e-6, rtol=0)


def test_whisper_pads_to_thirty_seconds_where_it_is_asked_to():
    encoder, sound = tiny_encoder_of("whisper", pad_to_30_seconds=True), tiny_sound(1.37)
    own = encoder.processor(sound, sampling_rate=RATE, return_tensors="pt")["input_features"]
    prepared = encoder.prepare(sound)
    assert torch.equal(prepared.values, own) and prepared.layout.rows == 1500


@pytest.mark.parametrize("layer", [-1, -2, -4])
def test_thirty_seconds_are_heard_as_transformers_does(layer):
    encoder = tiny_encoder_of("whisper", layer=layer)
    values = encoder.prepare(tiny_sound(30.0)).values
    with torch.no_grad():
        own = encoder.module(values, output_hidden_states=True)
    expected = own.last_hidden_state if layer == -1 else own.hidden_states[layer]
    torch.testing.assert_close(encode(encoder, values), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seconds", [0.01, 0.1, 1.37, 12.0])
def test_a_shorter_recording_is_heard_as_by_a_whisper_of_that_length(seconds):
    encoder = tiny_encoder_of("whisper")
    prepared = encoder.prepare(tiny_sound(seconds))
    config = copy.deepcopy(encoder.module.config)
    config.max_source_positions = prepared.layout.rows
    short = WhisperEncoder(config).eval()
    state = encoder.module.state_dict()
    state["embed_positions.weight"] = state["embed_positions.weight"][: prepared.layout.rows]
    short.load_state_dict(state)
    with torch.no_grad():
        expected = short(prepared.values).last_hidden_state
    torch.testing.assert_close(encode(encoder, prepared.values), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "seconds, window, windows, rows", [(31, 30.0, 2, 775), (31, 10.0, 4, 388), (600, 30.0, 20, 1500)]
)
def test_a_long_recording_is_heard_in_equal_windows(seconds, window, windows, rows):
    encoder = tiny_encoder_of("whisper", window_seconds=window)
    sound = tiny_sound(seconds)
    prepared = encoder.prepare(sound)
    assert (len(prepared.layout.marks), prepared.layout.rows) == (windows, rows)
    features = encode(encoder, prepared.values)
    assert features.shape == (windows, rows, encoder.width)
    second = encoder.prepare(sound[rows * 320 : 2 * rows * 320])
    torch.testing.assert_close(features[1], encode(encoder, second.values)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model", ["whole", "base", "encoder"])
def test_any_folder_of_a_whisper_is_read(model, tmp_path):
    from tiny_encoders import KINDS

    torch.manual_seed(1)
    whole, tower, processor = KINDS["whisper"][1]()
    {"whole": whole, "base": whole.model, "encoder": tower}[model].save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = whisper.build(whisper.Options(name=str(tmp_path)), torch.float32, torch.device("cpu"))
    assert type(encoder.module) is WhisperEncoder
    assert all(torch.equal(tensor, tower.state_dict()[name]) for name, tensor in encoder.module.state_dict().items())


def test_a_layer_that_whisper_has_not_is_refused():
    with pytest.raises(ModelError, match="3 layers; `layer: -5`"):
        tiny_encoder_of("whisper", layer=-5)


# Waves

WAVES = ["wav2vec2", "wav2vec2_large", "wav2vec2_adapter", "hubert", "wavlm", "data2vec-audio"]


@pytest.mark.parametrize("label", WAVES)
@pytest.mark.parametrize("samples", [400, 719, 720, 1600, 21_920, 480_000])
def test_rows_of_a_wave_are_those_that_transformers_counts(label, samples):
    encoder = tiny_encoder_of(label)
    expected = int(encoder.module._get_feat_extract_output_lengths(torch.tensor(samples)))
    assert encoder.prepare(np.zeros(samples, np.float32)).layout.rows == expected


@pytest.mark.parametrize("label", WAVES)
@pytest.mark.parametrize("layer", [-1, -2])
def test_a_wave_is_heard_as_transformers_does(label, layer):
    encoder, sound = tiny_encoder_of(label, layer=layer), tiny_sound(1.37)
    prepared = encoder.prepare(sound)
    inputs = encoder.processor(sound, sampling_rate=RATE, return_tensors="pt")["input_values"]
    assert torch.equal(prepared.values, inputs)
    normalised = (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7) if label != "hubert" else sound
    np.testing.assert_allclose(prepared.values[0].numpy(), normalised, atol=1e-6)
    with torch.no_grad():
        own = encoder.module(inputs, output_hidden_states=True)
    expected = own.last_hidden_state if layer == -1 else own.hidden_states[-2]
    features = encode(encoder, prepared.values)
    assert torch.equal(features, expected) and features.shape[1] == prepared.layout.rows


@pytest.mark.parametrize("seconds, windows, samples", [(30, 1, 480_000), (31, 2, 248_000), (600, 20, 480_000)])
def test_a_long_wave_is_heard_in_equal_windows(seconds, windows, samples):
    encoder = tiny_encoder_of("wav2vec2")
    prepared = encoder.prepare(tiny_sound(seconds))
    assert prepared.values.shape == (windows, samples) and len(prepared.layout.marks) == windows
    few = prepared.values[:2]
    assert encode(encoder, few).shape == (len(few), prepared.layout.rows, encoder.width)


def test_what_is_shorter_than_the_first_row_sees_is_filled_up():
    prepared = tiny_encoder_of("hubert").prepare(tiny_sound(0.01))
    assert prepared.values.shape == (1, 400) and prepared.layout.rows == 1
    assert not prepared.values[0, 160:].any()


# Spectrograms


def test_ast_gives_its_patches_moment_by_moment():
    encoder, sound = tiny_encoder_of("ast"), tiny_sound(1.0)
    values = encoder.prepare(sound).values
    own = encoder.processor(sound, sampling_rate=RATE, return_tensors="pt")["input_values"]
    assert torch.equal(values, own)
    with torch.no_grad():
        hidden = encoder.module(own).last_hidden_state
    frequencies, times = 2, 12  # of 32 bins and 128 frames, in patches of 16 every 10
    features = encode(encoder, values)
    assert hidden.shape[1] == 2 + frequencies * times and features.shape == (1, times * frequencies, 16)
    for time in range(times):
        for frequency in range(frequencies):
            assert torch.equal(features[:, time * frequencies + frequency], hidden[:, 2 + frequency * times + time])


@pytest.mark.parametrize("label", ["clap", "clap_fused"])
def test_clap_s_tower_is_heard_at_its_own_rate(label):
    encoder, sound = tiny_encoder_of(label), tiny_sound(4.0)
    values = encoder.prepare(sound).values
    fast = resampled(sound, 48_000)
    own = encoder.processor(fast, sampling_rate=48_000, return_tensors="pt")["input_features"]
    torch.testing.assert_close(values, own.float(), atol=1e-4, rtol=0)
    with torch.no_grad():
        grid = encoder.module(values, is_longer=torch.tensor([[False]])).last_hidden_state[0]
    features = encode(encoder, values)[0]
    width, frequencies, times = grid.shape
    assert features.shape == (times * frequencies, width)
    for time in range(times):
        for frequency in range(frequencies):
            assert torch.equal(features[time * frequencies + frequency], grid[:, frequency, time])


def test_clap_hears_the_end_of_a_sound_in_its_last_rows():
    """The tower folds time into frequency and back: its rows must come out in the order of time."""
    encoder = tiny_encoder_of("clap")
    sound = tiny_sound(10.0)
    changed = sound.copy()
    changed[8 * RATE :] = 0
    one, other = (encode(encoder, encoder.prepare(audio).values)[0] for audio in (sound, changed))
    difference = (one - other).abs().mean(1)
    assert difference.argmax() >= 0.7 * len(difference)
    assert difference[: len(difference) // 4].mean() < 0.5 * difference[-len(difference) // 4 :].mean()


@pytest.mark.parametrize("label, window", [("ast", 1.28), ("clap", 10.0), ("clap_fused", 10.0)])
@pytest.mark.parametrize("windows, more, expected", [(0, 0.01, 1), (1, 0, 1), (1, 0.05, 1), (1, 0.15, 2), (2, 0.5, 3)])
def test_windows_have_the_model_s_length_and_a_scrap_is_left_out(label, window, windows, more, expected):
    encoder = tiny_encoder_of(label)
    sound = tiny_sound(windows * window + more)
    prepared = encoder.prepare(sound)
    assert len(prepared.layout.marks) == len(prepared.values) == expected
    if windows > 1 and label == "ast":
        second = encoder.prepare(sound[round(window * RATE) : round(2 * window * RATE)])
        assert torch.equal(prepared.values[1], second.values[0])


def test_ast_s_published_sizes_fit():
    """1024 frames of 128 bins, 10.24 seconds: 12 x 101 patches."""
    config = transformers.ASTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    module, extractor = transformers.ASTModel(config), transformers.ASTFeatureExtractor()
    encoder = spectrogram.wrap(module, extractor, spectrogram.Options(name="tiny"))
    prepared = encoder.prepare(tiny_sound(20.0))
    assert prepared.values.shape == (2, 1024, 128) and prepared.layout.rows == 12 * 101


@pytest.mark.parametrize(
    "part, label", [(whisper, "hubert"), (wave, "whisper"), (wave, "ast"), (spectrogram, "whisper")]
)
def test_another_family_is_refused_with_the_kind_that_reads_it(part, label, tmp_path):
    folder = tiny_encoder_folder(tmp_path, label)
    with pytest.raises(ModelError, match="kind: "):
        part.build(part.Options(name=str(folder)), torch.float32, torch.device("cpu"))
