"""JSON lines or one JSON array, a conversation each, as chat APIs write them:

{"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
              {"role": "assistant", "content": "A cat."}]}

Parts of the OpenAI API are read too: image_url, input_audio, and audio_url and video_url as servers know them. A part
that is just {"type": "image"}, and `<image>` in a user's text, stand for the next of the media beside the messages, in
`image` or `images`; so for audio and video. Rows in the form of Alpaca (`instruction`, `input`, `output`) get messages
beside their keys. A row without messages has its keys as columns.
"""

from pathlib import Path

from finetune.common.registry import PartOptions
from finetune.data.formats import NumberedRows, _conversations, _json

Options = PartOptions


def detects(path: Path) -> bool:
    return _json.outline(path)[0] == "rows"


def rows(path: Path, options: Options) -> NumberedRows:
    for number, columns in _json.objects(path):
        yield number, _conversations.with_parts(f"{path.name}:{number}", columns)
