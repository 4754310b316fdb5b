"""Write down what is said (ASR). Error rates are edits per word or character of the transcript: less is better, 0 is
perfect, above 1 is possible.
"""

from pydantic import Field

from finetune.data.sample import Message, Row, Sample
from finetune.parts import PartOptions
from finetune.scoring import exact_match, words

PRIMARY = "exact_match"


class Options(PartOptions):
    prompt: str = Field("Transcribe.", description="The question put after the recording.")
    media: tuple[str, ...] = Field(("audio",), description="Kinds of media, each in the column of its name.")
    text: str = Field("text", description="Column that holds the transcript.")


def media(options: Options) -> tuple[str, ...]:
    return options.media


def sample(row: Row, options: Options) -> Sample:
    text = row.text(options.text)
    content = row.media(options.media, text)
    return Sample((Message("user", (*content, options.prompt)), Message("assistant", (text,))), row.where, "transcribe")


def read(answer: str, options: Options) -> str:
    return answer.strip()


def score(predictions: list[str], targets: list[str], options: Options) -> dict[str, float]:
    """Case and punctuation don't count; each Chinese, Japanese or Korean character is a word."""
    import jiwer

    said, right = [words(text) for text in predictions], [words(text) for text in targets]
    spaced, spaced_right = ([" ".join(row) for row in rows] for rows in (said, right))
    joined, joined_right = (["".join(row) for row in rows] for rows in (said, right))
    return {
        "exact_match": exact_match(spaced, spaced_right),
        "word_error_rate": float(jiwer.wer(spaced_right, spaced)),
        "character_error_rate": float(jiwer.cer(joined_right, joined)),
    }
