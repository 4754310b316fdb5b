"""What the server takes and how long it works: every bound, each changeable by `--option key=value`."""

import difflib
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from finetune.common.errors import RecipeError
from finetune.common.registry import PartOptions

MOST_IN_A_LIST = 10_000  # of a request; no option allows more


def _listed(value: Any) -> Any:
    return tuple(one.strip() for one in value.split(",") if one.strip()) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]


class Options(PartOptions):
    max_request_bytes: int = Field(64 * 2**20, ge=1, description="Of a request's body, bytes; more is 413.")
    max_bytes: int = Field(32 * 2**20, ge=1, description="Of one medium, bytes.")
    max_pixels: int = Field(32 * 10**6, ge=1, description="Of one picture or frame, pixels.")
    max_seconds: float = Field(600.0, gt=0, description="Of one recording or video, s.")
    max_frames: int = Field(256, ge=1, description="Kept of one video, frames.")
    max_media: int = Field(16, ge=0, description="Media of one request, number.")
    max_messages: int = Field(256, ge=1, le=MOST_IN_A_LIST, description="Messages of one request, number.")
    max_characters: int = Field(200_000, ge=1, description="Of a request's text, in all, characters.")
    max_new_tokens: int = Field(2048, ge=1, description="The most that a request may ask for, tokens.")
    new_tokens: int = Field(256, ge=1, description="What a request gets that doesn't say, tokens.")
    max_answers: int = Field(8, ge=1, description="Answers to one request (`n`), number.")
    max_inputs: int = Field(
        32, ge=1, le=MOST_IN_A_LIST, description="Texts of one request to classify or score, number."
    )
    max_stops: int = Field(16, ge=0, le=MOST_IN_A_LIST, description="Stop strings of one request, number.")
    queue_limit: int = Field(128, ge=0, description="Requests that wait, number; more are 429.")
    max_batch: int = Field(32, ge=1, description="Answers written at a time, number.")
    max_batch_tokens: int = Field(65_536, ge=1, description="Held in memory by answers written at a time, tokens.")
    media_cache_bytes: int = Field(256 * 2**20, ge=0, description="Features of media seen before, bytes; 0: none kept.")
    media_waiting_bytes: int = Field(2**30, ge=1, description="Of media decoded and not read yet, bytes; more are 429.")
    prefix_cache_bytes: int = Field(256 * 2**20, ge=0, description="Beginnings of prompts read before, bytes; 0: none.")
    max_connections: int = Field(256, ge=1, description="Open at a time, number; more are 503.")
    timeout_seconds: float = Field(120.0, gt=0, description="For one answer, its wait included, s; then 504.")
    body_seconds: float = Field(60.0, gt=0, description="For a request's head, then its body, to arrive, s.")
    drain_seconds: float = Field(30.0, ge=0, description="For running requests to end after SIGTERM, s.")
    hosts: Names = Field((), description="Hosts of media named by address, a.example,*.b.example; '' takes none.")
    origins: Names = Field((), description="Other sites' pages that may ask, https://a.example,...")


def options_of(given: Sequence[str]) -> Options:
    """Options from `key=value` each. Raises RecipeError."""
    values: dict[str, str] = {}
    for one in given:
        key, equals, value = one.partition("=")
        key = key.strip()
        if not equals:
            raise RecipeError(f"--option {one}: write key=value")
        if key not in Options.model_fields:
            near = difflib.get_close_matches(key, Options.model_fields, n=1)
            raise RecipeError(
                f"--option {one}: there is no {key!r}"
                + (f": did you mean {near[0]!r}?" if near else f"; there are {', '.join(Options.model_fields)}")
            )
        values[key] = value.strip()
    try:
        return Options.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise RecipeError(f"--option {key}={values[key]}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
