from dataclasses import replace

from families.family import MEANS, TEXT, Family

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
NAMED = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
TEXT_OF_QWEN = {
    **TEXT,
    "bos_token_id": "<|endoftext|>",
    "eos_token_id": "<|im_end|>",
    "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
}
PREPROCESSOR = {  # pictures of 4 to 64 patches of 8×8 pixels; four of them make one token
    "min_pixels": 4 * 8 * 8,
    "max_pixels": 64 * 8 * 8,
    "patch_size": 8,
    "temporal_patch_size": 2,
    "merge_size": 2,
    **MEANS,
    "image_processor_type": "Qwen2VLImageProcessor",
}
VIDEO_PREPROCESSOR = {**PREPROCESSOR, "video_processor_type": "Qwen2VLVideoProcessor"}
del VIDEO_PREPROCESSOR["image_processor_type"]

QWEN2_5_VL = Family(
    model_type="qwen2_5_vl",
    architecture="Qwen2_5_VLForConditionalGeneration",
    media=("image", "video"),
    config={
        **IDS,
        "text_config": {"model_type": "qwen2_5_vl_text", **TEXT_OF_QWEN},
        "vision_config": {
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 64,
            "tokens_per_second": 2,
        },
    },
    tokenizer="byte_level",
    special=SPECIAL,
    named=NAMED,
    chat_template=CHAT_TEMPLATE,
    preprocessor_config={**PREPROCESSOR, "processor_class": "Qwen2_5_VLProcessor"},
    processor_config={},
    video_preprocessor_config={**VIDEO_PREPROCESSOR, "processor_class": "Qwen2_5_VLProcessor"},
)

QWEN2_VL = replace(
    QWEN2_5_VL,
    model_type="qwen2_vl",
    architecture="Qwen2VLForConditionalGeneration",
    config={
        **IDS,
        "text_config": {"model_type": "qwen2_vl_text", **TEXT_OF_QWEN},
        "vision_config": {
            "depth": 3,
            "embed_dim": 64,
            "hidden_size": 64,
            "mlp_ratio": 2,
            "num_heads": 4,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
    preprocessor_config={**PREPROCESSOR, "processor_class": "Qwen2VLProcessor"},
    video_preprocessor_config={**VIDEO_PREPROCESSOR, "processor_class": "Qwen2VLProcessor"},
)

QWEN3_VL = replace(
    QWEN2_5_VL,
    model_type="qwen3_vl",
    architecture="Qwen3VLForConditionalGeneration",
    config={
        **IDS,
        "text_config": {
            "model_type": "qwen3_vl_text",
            **TEXT,
            "num_hidden_layers": 3,  # one after those that deep features are added to
            "head_dim": 32,
            "bos_token_id": "<|endoftext|>",
            "eos_token_id": "<|im_end|>",
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
                "rope_theta": 5e6,
            },
        },
        "vision_config": {
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
    },
    chat_template=(
        "{%- set image_count = namespace(value=0) %}{%- set video_count = namespace(value=0) %}"
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
        "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for content in message.content %}"
        "{%- if content.type == 'image' or 'image' in content or 'image_url' in content %}"
        "{%- set image_count.value = image_count.value + 1 %}"
        "{%- if add_vision_id %}Picture {{ image_count.value }}: {% endif -%}"
        "<|vision_start|><|image_pad|><|vision_end|>"
        "{%- elif content.type == 'video' or 'video' in content %}{%- set video_count.value = video_count.value + 1 %}"
        "{%- if add_vision_id %}Video {{ video_count.value }}: {% endif -%}"
        "<|vision_start|><|video_pad|><|vision_end|>"
        "{%- elif 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
    preprocessor_config={
        **{key: value for key, value in PREPROCESSOR.items() if key not in ("min_pixels", "max_pixels")},
        "size": {"shortest_edge": PREPROCESSOR["min_pixels"], "longest_edge": PREPROCESSOR["max_pixels"]},
        "processor_class": "Qwen3VLProcessor",
    },
    video_preprocessor_config={
        **{key: value for key, value in VIDEO_PREPROCESSOR.items() if key not in ("min_pixels", "max_pixels")},
        "size": {"shortest_edge": PREPROCESSOR["min_pixels"], "longest_edge": 8 * PREPROCESSOR["max_pixels"]},
        "video_processor_type": "Qwen3VLVideoProcessor",
        "processor_class": "Qwen3VLProcessor",
    },
)
