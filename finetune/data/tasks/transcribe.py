"""Write down what is said (ASR). Error rates are edits per word or character of the transcript: less is better, 0 is
perfect, above 1 is possible.
"""

from typing import Any

from pydantic import Field

from finetune.common.registry import PartOptions
from finetune.data.metrics import means
from finetune.data.metrics.text import edits, words
from finetune.data.sample import Answer, Message, Row, Sample
from finetune.data.tasks._columns import ask

HEADS = ("language",)
PRIMARY = "exact_match"


class Options(PartOptions):
    prompt: str = Field("Transcribe.", description="The question put after the recording.")
    media: tuple[str, ...] = Field(("audio",), description="Kinds of media, each in the column of its name.")
    text: str = Field("text", description="Column that holds the transcript.")


def media(options: Options) -> tuple[str, ...]:
    return options.media


def sample(row: Row, options: Options) -> Sample:
    text = row.text(options.text)
    question = ask(row, options.prompt, options.media, transcript=text)
    return Sample((question, Message("assistant", (text,))), row.where, "transcribe")


def read(answer: Answer, options: Options) -> str:
    return answer.text.strip()


def measure(prediction: str, target: str, options: Options) -> dict[str, Any]:
    counts = edits(prediction, target)
    good = 1.0 - min(counts["character_edits"] / max(counts["characters"], 1), 1.0)
    return {"good": good, "exact_match": float(words(prediction) == words(target)), **counts}


def score(rows: list[dict[str, Any]], options: Options) -> dict[str, float]:
    """Case and punctuation don't count; each Chinese, Japanese or Korean character is a word. Rates are of all rows
    together; they are left out where no transcript has a word.
    """
    rates = {}
    for name in ("word", "character"):
        if count := sum(row[f"{name}s"] for row in rows):
            rates[f"{name}_error_rate"] = sum(row[f"{name}_edits"] for row in rows) / count
    return means(rows, ("exact_match",)) | rates
