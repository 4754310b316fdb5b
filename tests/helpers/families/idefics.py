from dataclasses import replace

from families.family import TEXT, VISION, Family

MARKS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
CELLS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    **HALF,
    "image_processor_type": "Idefics3ImageProcessor",
    "max_image_size": {"longest_edge": 32},
    "processor_class": "Idefics3Processor",
    "resample": 1,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 64},
}

IDEFICS3 = Family(
    model_type="idefics3",
    architecture="Idefics3ForConditionalGeneration",
    media=("image",),
    config={
        "image_token_id": "<image>",
        "scale_factor": 2,
        "text_config": {"model_type": "llama", **TEXT, "pad_token_id": "<|finetune_right_pad_id|>"},
        "vision_config": VISION,
    },
    tokenizer="byte_level",
    special=("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", *MARKS, *CELLS),
    named={
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<end_of_utterance>",
        "pad_token": "<|finetune_right_pad_id|>",
    },
    begins_with="<|begin_of_text|>",
    chat_template="<|begin_of_text|>" + CHAT_TEMPLATE,
    preprocessor_config=PREPROCESSOR,
    processor_config={"image_seq_len": 4, "processor_class": "Idefics3Processor"},
)

SMOLVLM = replace(
    IDEFICS3,
    model_type="smolvlm",
    architecture="SmolVLMForConditionalGeneration",
    media=("image",),  # and videos as pictures, by torchvision
    config={
        "image_token_id": "<image>",
        "scale_factor": 2,
        "tie_word_embeddings": True,
        "text_config": {"model_type": "llama", **TEXT, "pad_token_id": "<|endoftext|>"},
        "vision_config": VISION,
    },
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", *MARKS, *CELLS),
    named={
        "bos_token": "<|im_start|>",
        "eos_token": "<end_of_utterance>",
        "pad_token": "<|endoftext|>",
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
    },
    begins_with=None,
    chat_template="<|im_start|>" + CHAT_TEMPLATE,
    preprocessor_config={
        **PREPROCESSOR,
        "image_processor_type": "SmolVLMImageProcessor",
        "processor_class": "SmolVLMProcessor",
    },
    processor_config={"image_seq_len": 4, "processor_class": "SmolVLMProcessor"},
    video_preprocessor_config={
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        **HALF,
        "fps": 1,
        "max_image_size": {"longest_edge": 32},
        "num_frames": 4,
        "processor_class": "SmolVLMProcessor",
        "size": {"longest_edge": 32},
        "video_processor_type": "SmolVLMVideoProcessor",
    },
    needs=("num2words",),
    seed=1,
)
