from families.audio import ENCODER, WHISPER_FEATURES
from families.family import MEANS, TEXT, Family

# The tokenizer of these families has its special tokens first; Voxtral's processor knows [AUDIO] by its number, 24.
SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "<SPECIAL_20>", "<SPECIAL_21>"),
    *("<SPECIAL_22>", "<SPECIAL_23>", "[AUDIO]", "[BEGIN_AUDIO]"),
)
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST]' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for block in message['content'] %}{% if block['type'] == 'text' %}{{ block['text'] }}"
    "{% elif block['type'] in ['image', 'image_url'] %}{{ '[IMG]' }}"
    "{% elif block['type'] == 'audio' %}{{ '[BEGIN_AUDIO][AUDIO]' }}{% endif %}{% endfor %}{% endif %}{{ '[/INST]' }}"
    "{% elif message['role'] == 'system' %}{{ '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{{ message['content'][0]['text'] }}"
    "{% endif %}{{ eos_token }}{% endif %}{% endfor %}"
)
PIXTRAL_TOWER = {
    "model_type": "pixtral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 8,
}
PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    **MEANS,
    "image_processor_type": "PixtralImageProcessor",
    "patch_size": {"height": 8, "width": 8},
    "processor_class": "PixtralProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 64},
}
PROCESSOR = {
    "image_break_token": "[IMG_BREAK]",
    "image_end_token": "[IMG_END]",
    "image_token": "[IMG]",
    "patch_size": 8,
    "processor_class": "PixtralProcessor",
}

PIXTRAL = Family(
    model_type="llava",
    architecture="LlavaForConditionalGeneration",
    media=("image",),
    config={
        "image_token_index": "[IMG]",
        "image_seq_length": 1,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "text_config": {"model_type": "mistral", **TEXT, "head_dim": 32, "sliding_window": None},
        "vision_config": PIXTRAL_TOWER,
    },
    tokenizer="specials_first",
    special=SPECIAL,
    named=NAMED,
    chat_template=CHAT_TEMPLATE,
    preprocessor_config=PREPROCESSOR,
    processor_config=PROCESSOR,
    needs=("torchvision",),
)

MISTRAL3 = Family(
    model_type="mistral3",
    architecture="Mistral3ForConditionalGeneration",
    media=("image",),
    config={
        "image_token_index": "[IMG]",
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
        "tie_word_embeddings": False,
        "text_config": {"model_type": "mistral", **TEXT, "head_dim": 32, "sliding_window": None},
        "vision_config": PIXTRAL_TOWER,
    },
    tokenizer="specials_first",
    special=SPECIAL,
    named=NAMED,
    chat_template=CHAT_TEMPLATE,
    preprocessor_config=PREPROCESSOR,
    processor_config={**PROCESSOR, "spatial_merge_size": 2},
    needs=("torchvision",),
)

VOXTRAL = Family(
    model_type="voxtral",
    architecture="VoxtralForConditionalGeneration",
    media=("audio",),
    config={
        "audio_token_id": "[AUDIO]",
        "text_config": {"model_type": "llama", **TEXT, "head_dim": 32},
        "audio_config": {  # its processor pads to 30 seconds, whatever the files say; four frames make one row
            "model_type": "voxtral_encoder",
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_mel_bins": ENCODER["num_mel_bins"],
            "max_source_positions": 1500,
        },
    },
    tokenizer="specials_first",
    special=SPECIAL,
    named=NAMED,
    chat_template="",
    recipe_template=CHAT_TEMPLATE,
    preprocessor_config={
        **WHISPER_FEATURES,
        "chunk_length": 30,
        "n_samples": 480_000,
        "nb_max_frames": 3000,
        "processor_class": "VoxtralProcessor",
    },
    processor_config={},
)
