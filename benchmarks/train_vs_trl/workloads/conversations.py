"""Long and uneven: one to ten turns about a picture, lists of names of its kind among them."""

import random
from collections.abc import Sequence

from benchmarks.train_vs_trl.workload import Conversation, Emoji, Workload
from benchmarks.train_vs_trl.workloads.questions import asked


def listed(emoji: Sequence[Emoji], generator: random.Random) -> tuple[str, str]:
    """A question whose answer is long: log-normal, about 12 names."""
    count = max(3, min(len(emoji), round(generator.lognormvariate(2.5, 0.6))))
    names = [one.name_zh for one in generator.sample(list(emoji), count)]
    return f"请再说出{count}个名字。", "、".join(names)


def rows(emoji: Sequence[Emoji], questions: int, generator: random.Random) -> list[Conversation]:
    found = []
    for one in emoji:
        turns = [*asked(one), *(listed(emoji, generator) for _ in range(6))]
        found.append(Conversation(one.image, generator.sample(turns, generator.randint(1, 10))))
    return found


WORKLOAD = Workload(rows, pictures=48, epochs=2, tokens_per_batch=2048)
