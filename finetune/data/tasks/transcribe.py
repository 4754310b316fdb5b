"""Transcribe speech (ASR). Error rates (WER, CER) are edits per word or character of the transcript: lower is better, 0
is perfect, and values above 1 are possible.
"""

from collections.abc import Sequence

from pydantic import Field

from finetune.data.metrics import means
from finetune.data.metrics.text import edits, words
from finetune.data.sample import Message, Row, Sample
from finetune.data.tasks import Measure, Media, Prompt, TaskOptions, _free_text
from finetune.data.tasks._columns import user_turn

HEADS = ("language",)
PRIMARY = "word_error_rate"


class Options(TaskOptions):
    prompt: Prompt = "Transcribe."
    media: Media = ("audio",)
    text: str = Field("text", description="Column of the transcript.")


read = _free_text.read


def sample(row: Row, options: Options) -> Sample:
    text = row.text(options.text)
    question = user_turn(row, options.media, (), options.prompt, transcript=text)
    return Sample((question, Message("assistant", (text,))), row.where, "transcribe")


def measure(prediction: str, target: str, options: Options) -> Measure:
    counts = edits(prediction, target)
    good = 1.0 - min(counts["character_edits"] / max(counts["characters"], 1), 1.0)
    return {"good": good, "exact_match": float(words(prediction) == words(target)), **counts}


def score(rows: Sequence[Measure], options: Options) -> dict[str, float]:
    """character_error_rate, and word_error_rate unless most words of the transcripts are Chinese, Japanese or Korean
    characters. Case and punctuation are ignored. Rates are computed over all rows together, and left out if no
    transcript has a word.
    """
    rates = {}
    by_word = 2 * sum(row["cjk"] for row in rows) <= sum(row["words"] for row in rows)
    for name in ("word", "character") if by_word else ("character",):
        if count := sum(row[f"{name}s"] for row in rows):
            rates[f"{name}_error_rate"] = sum(row[f"{name}_edits"] for row in rows) / count
    return rates | means(rows, ("exact_match",))
