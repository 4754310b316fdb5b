"""LLaVA's JSON, one array or an object per line:

{"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat?"},
                                                {"from": "gpt", "value": "A cat."}]}

`image`, `audio` and `video` hold a path or a list of them; each stands where the next `<image>`, `<audio>` or `<video>`
of the human's turns does. They become the column `messages`, for the task `chat`; other keys are columns too.
"""

from pathlib import Path

from finetune.common.registry import PartOptions
from finetune.data.formats import NumberedRows, _conversations, _json

Options = PartOptions


def detects(path: Path) -> bool:
    kind, keys = _json.outline(path)
    return kind == "conversations" and not keys.isdisjoint(_conversations.KINDS)


def rows(path: Path, options: Options) -> NumberedRows:
    for number, item in _json.objects(path):
        yield number, _conversations.with_messages(f"{path.name}:{number}", item, strict=True)
