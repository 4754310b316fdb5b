"""Several questions about each picture (--questions, at most 10), each a row of its own, in random order."""

import random
from collections.abc import Sequence

from benchmarks.train_vs_trl.workload import Conversation, Emoji, Workload


def asked(one: Emoji) -> list[tuple[str, str]]:
    """Answers from the table's columns."""
    return [
        ("这是什么？", one.name_zh),
        ("哪一类？", one.label),
        ("What is it?", one.name_en),
        ("Which group?", one.label_en),
        ("哪个子类？", one.subgroup),
        ("名字有几个字？", str(len(one.name_zh))),
        ("第一个字？", one.name_zh[0]),
        ("First letter?", one.name_en[0]),
        ("是自然吗？", "是" if one.label == "自然" else "否"),
        ("How many words?", str(len(one.name_en.split()))),
    ]


def rows(emoji: Sequence[Emoji], questions: int, generator: random.Random) -> list[Conversation]:
    found = [Conversation(one.image, [turn]) for one in emoji for turn in asked(one)[:questions]]
    generator.shuffle(found)
    return found


WORKLOAD = Workload(rows, pictures=24, runs=("peer-turns",))
