"""Families that listen."""

from dataclasses import replace

from families.family import TEXT, Family
from families.qwen_vl import NAMED as CHATML_NAMED
from families.qwen_vl import PREPROCESSOR as PICTURE_PREPROCESSOR
from families.qwen_vl import QWEN2_5_VL, TEXT_OF_QWEN, VIDEO_PREPROCESSOR

MELS = 16
SECONDS = 30  # that an encoder hears at once
ENCODER = {  # of Whisper's form
    "num_mel_bins": MELS,
    "d_model": 64,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "max_source_positions": 50 * SECONDS,
}
WHISPER_FEATURES = {
    "chunk_length": SECONDS,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": MELS,
    "hop_length": 160,
    "n_fft": 400,
    "n_samples": 16_000 * SECONDS,
    "nb_max_frames": 100 * SECONDS,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
    "sampling_rate": 16_000,
}

QWEN2_AUDIO = Family(
    model_type="qwen2_audio",
    architecture="Qwen2AudioForConditionalGeneration",
    media=("audio",),
    config={
        "audio_token_index": "<|AUDIO|>",
        "text_config": {"model_type": "qwen2", **TEXT},
        "audio_config": {"model_type": "qwen2_audio_encoder", **ENCODER},
    },
    tokenizer="byte_level",
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
    named=CHATML_NAMED,
    chat_template=(
        "{% set audio_count = namespace(value=0) %}{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
        "<|im_end|>\n{% else %}{% for content in message['content'] %}"
        "{% if 'audio' in content or 'audio_url' in content or message['type'] == 'audio' %}"
        "{% set audio_count.value = audio_count.value + 1 %}"
        "Audio {{ audio_count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
        "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    preprocessor_config={**WHISPER_FEATURES, "processor_class": "Qwen2AudioProcessor"},
    processor_config={},
)

AUDIO_FLAMINGO3 = Family(
    model_type="audioflamingo3",
    architecture="AudioFlamingo3ForConditionalGeneration",
    media=("audio",),
    config={
        "audio_token_id": "<sound>",
        "text_config": {"model_type": "qwen2", **TEXT},
        "audio_config": {"model_type": "audioflamingo3_encoder", **ENCODER},
    },
    tokenizer="byte_level",
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<sound>"),
    named=CHATML_NAMED,
    chat_template=(
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{% for message in messages if message['content'] is not none %}"
        "{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for content in message['content'] if content['type'] == 'audio' %}{{ '<sound>' }}{% endfor %}"
        "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] }}{% endfor %}"
        "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    preprocessor_config={**WHISPER_FEATURES, "processor_class": "AudioFlamingo3Processor"},
    processor_config={"audio_token": "<sound>", "processor_class": "AudioFlamingo3Processor"},
)

LLAMA3_CHAT = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'audio' %}{{ '<|audio|>' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# transformers has no class of this name: Whisper's encoder, two projecting layers and Llama 3, as another has them.
ULTRAVOX = replace(
    AUDIO_FLAMINGO3,
    config={
        "audio_token_id": "<|audio|>",
        "text_config": {"model_type": "llama", **TEXT},
        "audio_config": {"model_type": "audioflamingo3_encoder", **ENCODER},
    },
    special=(
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|audio|>",
    ),
    named={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|end_of_text|>"},
    begins_with="<|begin_of_text|>",
    chat_template=LLAMA3_CHAT,
    processor_config={"audio_token": "<|audio|>", "processor_class": "AudioFlamingo3Processor"},
)

GRANITE_SPEECH = Family(
    model_type="granite_speech",
    architecture="GraniteSpeechForConditionalGeneration",
    media=("audio",),
    config={
        "audio_token_index": "<|audio|>",
        "has_lora_adapter": False,
        "downsample_rate": 5,
        "window_size": 15,
        "tie_word_embeddings": True,
        "text_config": {"model_type": "granite", **TEXT, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
        "encoder_config": {
            "input_dim": 160,
            "num_layers": 3,
            "hidden_dim": 64,
            "feedforward_mult": 2,
            "num_heads": 4,
            "output_dim": 32,
            "context_size": 50,
            "max_pos_emb": 64,
            "dropout": 0.0,
        },
        "projector_config": {
            "model_type": "blip_2_qformer",
            "hidden_size": 64,
            "encoder_hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "cross_attention_frequency": 1,
            "attention_probs_dropout_prob": 0.0,
            "hidden_dropout_prob": 0.0,
        },
    },
    tokenizer="byte_level",
    special=("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|audio|>"),
    named={"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>"},
    chat_template=(
        "{% for message in messages %}{{ '<|start_of_role|>' + message['role'] + '<|end_of_role|>' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
        "{% if content['type'] == 'audio' %}{{ '<|audio|>' }}{% elif content['type'] == 'text' %}{{ content['text'] }}"
        "{% endif %}{% endfor %}{% endif %}{{ '<|end_of_text|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
    ),
    preprocessor_config={
        "feature_extractor_type": "GraniteSpeechFeatureExtractor",
        "melspec_kwargs": {"hop_length": 160, "n_fft": 512, "n_mels": 80, "sample_rate": 16_000, "win_length": 400},
        "processor_class": "GraniteSpeechProcessor",
        "projector_downsample_rate": 5,
        "projector_window_size": 15,
        "sampling_rate": 16_000,
    },
    processor_config={"audio_token": "<|audio|>", "processor_class": "GraniteSpeechProcessor"},
    needs=("torchaudio",),
)

QWEN2_5_OMNI = Family(
    model_type="qwen2_5_omni_thinker",
    architecture="Qwen2_5OmniThinkerForConditionalGeneration",
    media=("image", "audio", "video"),
    config={
        "audio_token_index": "<|AUDIO|>",
        "image_token_index": "<|IMAGE|>",
        "video_token_index": "<|VIDEO|>",
        "audio_start_token_id": "<|audio_bos|>",
        "audio_end_token_id": "<|audio_eos|>",
        "vision_start_token_id": "<|vision_bos|>",
        "vision_end_token_id": "<|vision_eos|>",
        "text_config": {"model_type": "qwen2_5_omni_text", **TEXT_OF_QWEN, "tie_word_embeddings": False},
        "vision_config": {
            "model_type": "qwen2_5_omni_vision_encoder",
            **{key: value for key, value in QWEN2_5_VL.config["vision_config"].items() if key != "tokens_per_second"},
        },
        "audio_config": {
            "model_type": "qwen2_5_omni_audio_encoder",
            **ENCODER,
            "n_window": 25,
            "output_dim": 64,
        },
    },
    tokenizer="byte_level",
    special=(
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
        *("<|vision_bos|>", "<|vision_eos|>", "<|IMAGE|>", "<|VIDEO|>"),
    ),
    named={
        **CHATML_NAMED,
        "image_token": "<|IMAGE|>",
        "audio_token": "<|AUDIO|>",
        "video_token": "<|VIDEO|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
    },
    chat_template=(
        "{% set audio_count = namespace(value=0) %}{% set image_count = namespace(value=0) %}"
        "{% set video_count = namespace(value=0) %}{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
        "<|im_end|>\n{% else %}{% for content in message['content'] %}"
        "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
        "{% set image_count.value = image_count.value + 1 %}"
        "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_bos|><|IMAGE|><|vision_eos|>"
        "{% elif content['type'] == 'audio' or 'audio' in content or 'audio_url' in content %}"
        "{% set audio_count.value = audio_count.value + 1 %}"
        "{% if add_audio_id %}Audio {{ audio_count.value }}: {% endif %}<|audio_bos|><|AUDIO|><|audio_eos|>"
        "{% elif content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}"
        "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_bos|><|VIDEO|><|vision_eos|>"
        "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    preprocessor_config={
        **PICTURE_PREPROCESSOR,
        **WHISPER_FEATURES,
        "n_window": 25,
        "processor_class": "Qwen2_5OmniProcessor",
    },
    processor_config={},
    video_preprocessor_config={**VIDEO_PREPROCESSOR, "processor_class": "Qwen2_5OmniProcessor"},
)
