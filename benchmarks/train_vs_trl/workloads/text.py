"""No media: names to translate and lists of names, of uneven lengths."""

import random
from collections.abc import Sequence

from benchmarks.train_vs_trl.workload import Conversation, Emoji, Workload
from benchmarks.train_vs_trl.workloads.conversations import listed


def rows(emoji: Sequence[Emoji], questions: int, generator: random.Random) -> list[Conversation]:
    translated = [Conversation(None, [(f"翻译：{one.name_en}", one.name_zh)]) for one in emoji]
    found = [*translated, *(Conversation(None, [listed(emoji, generator)]) for _ in emoji)]
    generator.shuffle(found)
    return found


WORKLOAD = Workload(rows, pictures=96, tokens_per_batch=1024, media=False)
