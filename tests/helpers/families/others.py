from families.family import TEXT, VISION, Family
from families.qwen_vl import NAMED as CHATML_NAMED
from families.qwen_vl import QWEN3_VL

HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}

PHI4_MULTIMODAL = Family(
    model_type="phi4_multimodal",
    architecture="Phi4MultimodalForCausalLM",
    media=("image", "audio"),
    config={
        **TEXT,
        "bos_token_id": "<|endoftext|>",
        "eos_token_id": "<|end|>",
        "pad_token_id": "<|endoftext|>",
        "original_max_position_embeddings": 2048,
        "vision_config": {  # its processor counts tokens of 448 pixels and patches of 14, whatever the files say
            **VISION,
            "image_size": 448,
            "crop_size": 448,
            "patch_size": 14,
            "image_token_id": "<|image|>",
        },
        "audio_config": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_blocks": 2,
            "num_attention_heads": 4,
            "ext_pw_out_channel": 64,
            "depthwise_separable_out_channel": 64,
            "nemo_conv_channels": 64,
            "bias_max_distance": 100,
            "feature_layer": -1,
            "audio_token_id": "<|audio|>",
        },
    },
    tokenizer="byte_level",
    special=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|image|>", "<|audio|>"),
    named={
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "image_token": "<|image|>",
        "audio_token": "<|audio|>",
    },
    chat_template=(
        "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
        "{% if content['type'] == 'image' %}{{ '<|image|>' }}{% elif content['type'] == 'audio' %}{{ '<|audio|>' }}"
        "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    preprocessor_config={
        "dynamic_hd": 2,
        **HALF,
        "image_processor_type": "Phi4MultimodalImageProcessor",
        "feature_extractor_type": "Phi4MultimodalFeatureExtractor",
        "audio_compression_rate": 8,
        "audio_downsample_rate": 1,
        "audio_feat_stride": 1,
        "processor_class": "Phi4MultimodalProcessor",
        "size": {"height": 448, "width": 448},
    },
    processor_config={},
    needs=("torchvision",),
)

MINICPM_V = Family(
    model_type="minicpmv4_6",
    architecture="MiniCPMV4_6ForConditionalGeneration",
    media=("image", "video"),
    config={
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "image_size": 32,
        "insert_layer_id": 0,
        "text_config": {
            "model_type": "qwen3_5_text",
            **TEXT,
            "head_dim": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        "vision_config": {**VISION, "image_size": 560},  # 70 positions a side, as llama.cpp assumes
    },
    tokenizer="byte_level",
    special=(
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "</image>", "<slice>", "</slice>"),
        *("<image_id>", "</image_id>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    ),
    named={
        **CHATML_NAMED,
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    },
    chat_template=QWEN3_VL.chat_template.replace("<|vision_start|>", "").replace("<|vision_end|>", ""),
    preprocessor_config={
        **HALF,
        "image_processor_type": "MiniCPMV4_6ImageProcessor",
        "max_slice_nums": 9,
        "patch_size": 8,
        "processor_class": "MiniCPMV4_6Processor",
        "scale_resolution": 32,
    },
    processor_config={},
    video_preprocessor_config={
        **HALF,
        "max_slice_nums": 1,
        "patch_size": 8,
        "processor_class": "MiniCPMV4_6Processor",
        "scale_resolution": 32,
        "video_processor_type": "MiniCPMV4_6VideoProcessor",
    },
    needs=("torchvision",),
)
