"""Say in words what a picture, a recording or a video shows."""

from pydantic import Field

from finetune.data.sample import Message, Row, Sample
from finetune.parts import PartOptions
from finetune.scoring import free_text

PRIMARY = "token_f1"


class Options(PartOptions):
    prompt: str = Field("Describe the picture.", description="The question put after the media.")
    media: tuple[str, ...] = Field(("image",), description="Kinds of media, each in the column of its name.")
    caption: str = Field("caption", description="Column that holds the caption.")


def media(options: Options) -> tuple[str, ...]:
    return options.media


def sample(row: Row, options: Options) -> Sample:
    caption = row.text(options.caption)
    content = row.media(options.media, caption)
    return Sample((Message("user", (*content, options.prompt)), Message("assistant", (caption,))), row.where, "caption")


def read(answer: str, options: Options) -> str:
    return answer.strip()


def score(predictions: list[str], targets: list[str], options: Options) -> dict[str, float]:
    return free_text(predictions, targets)
