"""Pairs by DPO: of each picture its own description is chosen, and that of another picture is rejected."""

import random
from collections.abc import Sequence

from benchmarks.train_vs_trl.workload import Conversation, Emoji, Workload


def described(one: Emoji) -> str:
    return f"这是{one.name_zh}，属于{one.label}。"


def rows(emoji: Sequence[Emoji], questions: int, generator: random.Random) -> list[Conversation]:
    others = [*emoji[1:], emoji[0]]
    return [
        Conversation(one.image, [("图片里是什么？", described(one))], described(other))
        for one, other in zip(emoji, others, strict=True)
    ]


WORKLOAD = Workload(rows, pictures=48, pixels=224, tokens_per_batch=1024, objective="dpo", variants=False)
