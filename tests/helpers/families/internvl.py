from families.family import MEANS, TEXT, VISION, Family

PREPROCESSOR = {
    "crop_to_patches": False,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    **MEANS,
    "image_processor_type": "GotOcr2ImageProcessor",
    "max_patches": 4,
    "min_patches": 1,
    "processor_class": "InternVLProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": 32, "width": 32},
}

INTERNVL = Family(
    model_type="internvl",
    architecture="InternVLForConditionalGeneration",
    media=("image",),  # and videos as pictures, by torchvision
    config={
        "image_token_id": "<IMG_CONTEXT>",
        "image_seq_length": 4,
        "downsample_ratio": 0.5,
        "vision_feature_layer": -1,
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {"model_type": "internvl_vision", **VISION, "image_size": [32, 32], "patch_size": [8, 8]},
    },
    tokenizer="byte_level",
    special=(
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"),
        *("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<video>"),
    ),
    named={
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    chat_template=(
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
        "{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
        "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    preprocessor_config=PREPROCESSOR,
    processor_config={"image_seq_length": 4, "processor_class": "InternVLProcessor"},
    video_preprocessor_config={
        **{key: value for key, value in PREPROCESSOR.items() if "patches" not in key and "type" not in key},
        "video_processor_type": "InternVLVideoProcessor",
    },
)
