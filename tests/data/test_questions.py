"""Typed questions are put as the task puts those of its rows."""

import pytest
from tiny import part

from finetune.data.questions import Wording, worded

FIELDS = '{"total": "number"}'


@pytest.mark.parametrize(
    ("task", "options", "typed", "expected"),
    [
        ("extract", {"fields": {"total": "number"}}, "Fill this in.", Wording(f"Fill this in.\n{FIELDS}", ())),
        ("extract", {"fields": {"total": "number"}, "answer": ""}, "Read.", Wording(f"Read.\n{FIELDS}", ())),
        ("answer", {"prompt": "Answer in one word."}, "What is red?", Wording("What is red?\nAnswer in one word.", ())),
        ("answer", {"prompt": "In a word."}, "What is red?\nIn a word.", Wording("What is red?\nIn a word.", ())),
        ("classify", {"text": "record"}, "Which illness?", Wording("Which illness?", ("record",))),
        ("rank", {"media": ("image",)}, "Clicked?", Wording("Clicked?", ("history", "item"))),
        ("caption", {}, "", Wording("", ())),
        ("chat", {}, "Hello", Wording("Hello", ())),
    ],
)
def test_a_typed_question(task, options, typed, expected):
    assert worded(typed, part("tasks", task, **options)) == expected
