from families.family import MEANS, TEXT, VISION, Family
from families.tokenizers_of import SIZE

SPECIAL = (
    *("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
)
NAMED = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}
CHAT_TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""

GEMMA3 = Family(
    model_type="gemma3",
    architecture="Gemma3ForConditionalGeneration",
    media=("image",),
    config={
        "mm_tokens_per_image": 4,
        "image_token_index": "<image_soft_token>",
        "boi_token_index": "<start_of_image>",
        "eoi_token_index": "<end_of_image>",
        "text_config": {
            "model_type": "gemma3_text",
            **TEXT,
            "num_hidden_layers": 6,  # the last without a window, as llama.cpp assumes
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "sliding_window_pattern": 6,
            "pad_token_id": "<pad>",
            "bos_token_id": "<bos>",
            "eos_token_id": "<eos>",
        },
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
    },
    tokenizer="metaspace",
    special=SPECIAL,
    named=NAMED,
    begins_with="<bos>",
    chat_template=CHAT_TEMPLATE,
    preprocessor_config={
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_pan_and_scan": None,
        "do_rescale": True,
        "do_resize": True,
        **MEANS,
        "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": 4,
        "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_crop_size": None,
        "pan_and_scan_min_ratio_to_activate": None,
        "processor_class": "Gemma3Processor",
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": 32, "width": 32},
    },
    processor_config={"image_seq_length": 4, "processor_class": "Gemma3Processor"},
    seed=4,
)

PALIGEMMA = Family(
    model_type="paligemma",
    architecture="PaliGemmaForConditionalGeneration",
    media=("image",),
    config={
        "image_token_index": "<image>",
        "projection_dim": 64,
        "hidden_size": 64,
        "vocab_size": SIZE,
        "text_config": {
            "model_type": "gemma",
            **TEXT,
            "head_dim": 32,
            "pad_token_id": "<pad>",
            "bos_token_id": "<bos>",
            "eos_token_id": "<eos>",
        },
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
    },
    tokenizer="metaspace",
    special=("<pad>", "<eos>", "<bos>", "<image>"),
    named={key: value for key, value in NAMED.items() if not key.endswith(("image_token", "boi_token", "eoi_token"))},
    chat_template="",
    preprocessor_config={
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": 16,
        "processor_class": "PaliGemmaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": 32, "width": 32},
    },
    processor_config={},
)
