from families.family import MEANS, TEXT, VISION, Family

SPECIAL = ("<s>", "</s>", "<pad>", "<image>")
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
PREPROCESSOR = {
    "crop_size": {"height": 32, "width": 32},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_processor_type": "CLIPImageProcessor",
    **MEANS,
    "processor_class": "LlavaProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 32},
}

LLAVA = Family(
    model_type="llava",
    architecture="LlavaForConditionalGeneration",
    media=("image",),
    config={
        "image_token_index": "<image>",
        "image_seq_length": 16,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
    },
    tokenizer="metaspace",
    special=SPECIAL,
    named=NAMED,
    begins_with="<s>",
    chat_template=CHAT_TEMPLATE,
    preprocessor_config=PREPROCESSOR,
    processor_config={
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": 8,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    },
)

LLAVA_NEXT = Family(
    model_type="llava_next",
    architecture="LlavaNextForConditionalGeneration",
    media=("image",),
    config={
        "image_token_index": "<image>",
        "image_grid_pinpoints": PINPOINTS,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {"model_type": "mistral", **TEXT, "sliding_window": None},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
    },
    tokenizer="metaspace",
    special=SPECIAL,
    named=NAMED,
    begins_with="<s>",
    chat_template=(
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
        "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
        "{# Render all images first #}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
        "{# Render all text next #}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}"
        "{% endfor %}{{ ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    preprocessor_config={
        **PREPROCESSOR,
        "aspect_ratio_setting": "anyres",
        "image_grid_pinpoints": PINPOINTS,
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "LlavaNextProcessor",
    },
    processor_config={
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": 8,
        "processor_class": "LlavaNextProcessor",
        "vision_feature_select_strategy": "default",
    },
)

LLAVA_ONEVISION = Family(
    model_type="llava_onevision",
    architecture="LlavaOnevisionForConditionalGeneration",
    media=("image", "video"),
    config={
        "image_token_index": "<image>",
        "video_token_index": "<video>",
        "image_grid_pinpoints": PINPOINTS,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
    },
    tokenizer="byte_level",
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"),
    named={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    chat_template=(
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
        "{# Render all images first #}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
        "{# Render all video then #}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"
        "{# Render all text next #}"
        "{% if message['role'] != 'assistant' %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
        "{% endfor %}{% else %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
        "{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    preprocessor_config={
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": PINPOINTS,
        **MEANS,
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "processor_class": "LlavaOnevisionProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": 32, "width": 32},
    },
    processor_config={
        "image_token": "<image>",
        "num_image_tokens": 16,
        "processor_class": "LlavaOnevisionProcessor",
        "video_token": "<video>",
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_select_strategy": "full",
    },
    video_preprocessor_config={
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        **MEANS,
        "processor_class": "LlavaOnevisionProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": 32, "width": 32},
        "video_processor_type": "LlavaOnevisionVideoProcessor",
    },
)
