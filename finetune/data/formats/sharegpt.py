"""ShareGPT's JSON, one array or an object per line:

{"system": "Be brief.", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]}

`images`, `audios` and `videos` beside them stand where `<image>`, `<audio>` and `<video>` do in the human's turns. They
become the column `messages`, for the task `chat`; other keys are columns too.
"""

from pathlib import Path

from finetune.common.registry import PartOptions
from finetune.data.formats import NumberedRows, _conversations, _json

Options = PartOptions


def detects(path: Path) -> bool:
    kind, keys = _json.outline(path)
    return kind == "conversations" and keys.isdisjoint(_conversations.KINDS)


def rows(path: Path, options: Options) -> NumberedRows:
    for number, item in _json.objects(path):
        yield number, _conversations.with_messages(f"{path.name}:{number}", item, strict=False)
