"""JSON lines, one conversation each, as chat APIs write them:

{"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
              {"role": "assistant", "content": "A cat."}]}
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.errors import DataError


def detects(path: Path) -> bool:
    return path.suffix.lower() in {".jsonl", ".ndjson"}


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                columns = json.loads(line)
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{path.name}:{number}: not JSON ({error})") from None
            if not isinstance(columns, dict):
                raise DataError(f"{path.name}:{number}: a {type(columns).__name__}, not an object with 'messages'")
            yield number, columns
