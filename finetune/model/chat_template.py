"""Turns a chat template for text into one that takes media as parts of a message."""

from collections.abc import Mapping
from typing import Any

from finetune.model.tokenize import Placeholder, template_options

# Clients' names of the parts; each becomes its placeholder, with nothing around it.
PART_TYPES = {
    "image": ("image", "image_url", "input_image"),
    "audio": ("audio", "audio_url", "input_audio"),
    "video": ("video", "video_url", "input_video"),
}
FIRST_LINE = "{#- media are parts of a message -#}"


def with_media_parts(tokenizer: Any, placeholders: Mapping[str, Placeholder]) -> str:
    """The tokenizer's chat template, preceded by lines that join a message's parts to one text, and that set the
    options of training (Qwen3's `enable_thinking`). A template that has these lines already is returned unchanged.
    """
    if str(tokenizer.chat_template).startswith(FIRST_LINE):
        return str(tokenizer.chat_template)
    branches = "".join(
        f"{{%- elif part['type'] in {PART_TYPES[kind]!r} -%}}{{%- set text.all = text.all + {placeholder.token!r} -%}}"
        for kind, placeholder in placeholders.items()
    )
    options = "".join(
        f"{{%- set {name} = {str(value).lower()} -%}}" for name, value in template_options(tokenizer).items()
    )
    return (
        f"{FIRST_LINE}{options}{{%- set whole = namespace(messages=[]) -%}}"
        "{%- for message in messages -%}"
        "{%- if message['content'] is string -%}"
        "{%- set whole.messages = whole.messages + [message] -%}"
        "{%- else -%}"
        "{%- set text = namespace(all='') -%}"
        "{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'text' -%}{%- set text.all = text.all + part['text'] -%}"
        f"{branches}"
        "{%- endif -%}{%- endfor -%}"
        "{%- set whole.messages = whole.messages + [dict(message, content=text.all)] -%}"
        "{%- endif -%}{%- endfor -%}"
        "{%- set messages = whole.messages %}\n"  # the line's end goes with the block, as transformers renders them
    ) + str(tokenizer.chat_template)
