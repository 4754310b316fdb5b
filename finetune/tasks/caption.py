"""Say in words what a picture shows."""

from pydantic import Field

from finetune.data.sample import Message, Row, Sample
from finetune.parts import PartOptions
from finetune.scoring import exact_match, token_f1

PRIMARY = "token_f1"


class Options(PartOptions):
    prompt: str = Field("Describe the picture.", description="The question put after the picture.")
    image: str = Field("image", description="Column that names the picture.")
    caption: str = Field("caption", description="Column that holds the caption.")


def media(options: Options) -> tuple[str, ...]:
    return ("image",)


def sample(row: Row, options: Options) -> Sample:
    picture = row.medium("image", row.text(options.image))
    return Sample(
        (Message("user", (picture, options.prompt)), Message("assistant", (row.text(options.caption),))),
        row.where,
        "caption",
    )


def read(answer: str, options: Options) -> str:
    return answer.strip()


def score(predictions: list[str], targets: list[str], options: Options) -> dict[str, float]:
    return {"exact_match": exact_match(predictions, targets), "token_f1": token_f1(predictions, targets)}
