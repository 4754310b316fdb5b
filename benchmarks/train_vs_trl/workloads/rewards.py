"""Questions about pictures whose sampled answers are rewarded by GRPO: the shorter, the better, so that any model, also
an untrained one, gives answers of different worth.
"""

import random
from collections.abc import Sequence

from benchmarks.train_vs_trl.workload import Conversation, Emoji, Workload


def rows(emoji: Sequence[Emoji], questions: int, generator: random.Random) -> list[Conversation]:
    return [Conversation(one.image, [("图片里是什么？", one.label)]) for one in emoji]


def shortness(answer: str) -> float:
    return -float(len(answer))


WORKLOAD = Workload(
    rows,
    pictures=24,
    epochs=1,
    objective="grpo",
    settings={"answers": 8, "max_new_tokens": 16},
    variants=False,
    reward=shortness,
)
