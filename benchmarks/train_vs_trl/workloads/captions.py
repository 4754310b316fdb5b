"""One row a picture: the quickstart's pictures and groups."""

import random
from collections.abc import Sequence

from benchmarks.train_vs_trl.workload import Conversation, Emoji, Workload


def rows(emoji: Sequence[Emoji], questions: int, generator: random.Random) -> list[Conversation]:
    return [Conversation(one.image, [("图片里是什么？", one.label)]) for one in emoji]


WORKLOAD = Workload(rows, pictures=64)
