"""Several questions about each picture (--questions, at most 10), each a row of its own, in random order."""

import random
from collections.abc import Sequence

from benchmarks.train_vs_trl.workload import Conversation, Emoji, Workload


def asked(one: Emoji) -> list[tuple[str, str]]:
    """Answers from the table's columns."""
    return [
        ("这是什么？", one.name_zh),
        ("它属于哪一类？", one.label),
        ("What is this?", one.name_en),
        ("Which group is it in?", one.label_en),
        ("它属于哪个子类？", one.subgroup),
        ("它的名字有几个字？", str(len(one.name_zh))),
        ("它的名字的第一个字是什么？", one.name_zh[0]),
        ("How does its name begin?", one.name_en[0]),
        ("它是自然界的吗？", "是" if one.label == "自然" else "否"),
        ("How many words has its name?", str(len(one.name_en.split()))),
    ]


def rows(emoji: Sequence[Emoji], questions: int, generator: random.Random) -> list[Conversation]:
    found = [Conversation(one.image, [turn]) for one in emoji for turn in asked(one)[:questions]]
    generator.shuffle(found)
    return found


WORKLOAD = Workload(rows, pictures=24, runs=("peer-turns",))
