"""What tasks share whose answers are free text."""

from collections.abc import Sequence

from finetune.data.metrics import means
from finetune.data.metrics.text import FREE_TEXT, free_text
from finetune.data.sample import Answer
from finetune.data.tasks import Measure, TaskOptions


def read(answer: Answer, options: TaskOptions) -> str:
    return answer.text.strip()


def measure(prediction: str, target: str | list[str], options: TaskOptions) -> Measure:
    """`target`: one reference or several, of which the nearest counts. "good" is token_f1."""
    return {**free_text(prediction, [target] if isinstance(target, str) else target)}


def score(rows: Sequence[Measure], options: TaskOptions) -> dict[str, float]:
    """Means over rows: exact_match, letter for letter; token_f1 of the words in common; rouge_l of the longest common
    subsequence of words.
    """
    return means(rows, FREE_TEXT)
