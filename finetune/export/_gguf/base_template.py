"""Chat templates of bases for llama.cpp, which hands a medium to them as a marker in a message's text, where a base's
own processor hands over a part of the message.
"""

from pathlib import Path

# By the base's class: the kind of medium, what its template writes for one, and, as expressions of the template, what
# its processor puts around that and llama.cpp doesn't. llama.cpp adds the tokens that begin and end a medium.
VISION = ("image", "<|vision_start|><|image_pad|><|vision_end|>", "''", "''")
MEDIA = {
    "Gemma3ForConditionalGeneration": ("image", "<start_of_image>", r"'\n\n'", r"'\n\n'"),
    "GraniteSpeechForConditionalGeneration": ("audio", "<|audio|>", "''", "''"),
    "Idefics3ForConditionalGeneration": ("image", "<image>", "''", "''"),
    "LlavaForConditionalGeneration": ("image", "[IMG]", "''", "''"),  # Pixtral: the converter refuses others
    "MiniCPMV4_6ForConditionalGeneration": (
        "image",
        "<|image_pad|>",
        "'<image_id>' ~ (loop.index0 - 1) ~ '</image_id>'",
        "''",
    ),
    "Mistral3ForConditionalGeneration": ("image", "[IMG]", "''", "''"),
    "Qwen2AudioForConditionalGeneration": ("audio", "<|audio_bos|><|AUDIO|><|audio_eos|>", "''", "''"),
    "Qwen2VLForConditionalGeneration": VISION,
    "Qwen2_5_VLForConditionalGeneration": VISION,
    "Qwen3VLForConditionalGeneration": VISION,
    "SmolVLMForConditionalGeneration": ("image", "<image>", "''", "''"),
    "VoxtralForConditionalGeneration": ("audio", "[BEGIN_AUDIO][AUDIO]", "''", "''"),
}
MARKER = ("<__media", "__>")  # its ends; a server draws what is between


def write_template(folder: Path, architecture: str) -> None:
    """Rewrite FOLDER/chat_template.jinja for llama.cpp, if the base's class is one of MEDIA."""
    file = folder / "chat_template.jinja"
    if architecture in MEDIA and file.is_file():
        file.write_text(with_markers(file.read_text(encoding="utf-8"), architecture), encoding="utf-8")


def with_markers(template: str, architecture: str) -> str:
    """`template`, where it gets each marker as a part of its message, and what it writes for it is the marker again."""
    kind, written, before, after = MEDIA[architecture]
    begin, end = MARKER
    return (
        "{%- set whole = namespace(messages=[], marker='') -%}"
        "{%- for message in messages -%}"
        "{%- set turn = namespace(parts=[]) -%}"
        # llama.cpp joins all parts to a text, alone or as the only part, as the template takes it.
        "{%- if message['content'] is string -%}{%- set joined = message['content'] -%}"
        "{%- elif message['content'] and message['content'][0]['text'] is string -%}"
        "{%- set joined = message['content'][0]['text'] -%}"
        "{%- else -%}{%- set joined = '' -%}{%- endif -%}"
        f"{{%- if {begin!r} in joined -%}}"
        f"{{%- for piece in joined.split({begin!r}) -%}}"
        "{%- if loop.first -%}{%- set text = piece -%}"
        "{%- else -%}"
        f"{{%- set drawn = piece.split({end!r})[0] -%}}"
        f"{{%- set whole.marker = {begin!r} + drawn + {end!r} -%}}"
        f"{{%- set turn.parts = turn.parts + [{{'type': {kind!r}, {kind!r}: ''}}] -%}}"
        f"{{%- set text = piece[(drawn | length) + {len(end)}:] -%}}"
        "{%- endif -%}"
        "{%- if text -%}{%- set turn.parts = turn.parts + [{'type': 'text', 'text': text}] -%}{%- endif -%}"
        "{%- endfor -%}"
        "{%- set whole.messages = whole.messages + [{'role': message['role'], 'content': turn.parts}] -%}"
        "{%- else -%}"
        "{%- set whole.messages = whole.messages + [message] -%}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- set messages = whole.messages -%}"
        "{%- set rendered %}\n" + template.removesuffix("\n") + "{% endset -%}"
        "{%- if whole.marker -%}"
        f"{{%- for piece in rendered.split({written!r}) -%}}"
        f"{{%- if not loop.first -%}}{{{{- {before} ~ whole.marker ~ {after} -}}}}{{%- endif -%}}"
        "{{- piece -}}"
        "{%- endfor -%}"
        "{%- else -%}{{- rendered -}}{%- endif -%}"
    )
