"""The server's limits, each set by `--option key=value`."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from finetune.recipe.schema import Limits
from finetune.serving.engine.contract import EngineLimits

MOST_IN_A_LIST = 10_000  # items of a request; no option allows more


def _split(value: object) -> object:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
ListSize = Annotated[int, Field(le=MOST_IN_A_LIST)]


class ServerOptions(EngineLimits):
    """Those of HTTP and of media, beside the engine's."""

    max_request_bytes: int = Field(64 * 2**20, ge=1, description="Size of a request body, bytes; larger ones get 413.")
    max_bytes: int = Field(32 * 2**20, ge=1, description="Size of one medium, bytes.")
    max_pixels: int = Field(32 * 10**6, ge=1, description="Size of one picture or video frame, pixels.")
    max_seconds: float = Field(600.0, gt=0, description="Duration of one recording or video, s.")
    max_frames: int = Field(256, ge=1, description="Frames sampled from one video.")
    max_media: int = Field(16, ge=0, description="Media in one request.")
    max_messages: ListSize = Field(256, ge=1, description="Messages in one request.")
    max_characters: int = Field(200_000, ge=1, description="Total length of a request's text, characters.")
    max_new_tokens: int = Field(2048, ge=1, description="Largest `max_tokens` of a request.")
    new_tokens: int = Field(256, ge=1, description="`max_tokens` of a request that doesn't set it.")
    max_answers: int = Field(8, ge=1, description="Answers to one request (`n`).")
    max_inputs: ListSize = Field(32, ge=1, description="Texts in one request to classify or score.")
    max_stops: ListSize = Field(16, ge=0, description="Stop strings in one request.")
    max_connections: int = Field(256, ge=1, description="Open connections; further ones get 503.")
    timeout_seconds: float = Field(120.0, gt=0, description="Time for one answer, queueing included, s; then 504.")
    body_seconds: float = Field(60.0, gt=0, description="Time for a request's headers, and for its body, to arrive, s.")
    drain_seconds: float = Field(30.0, ge=0, description="Time for running requests to finish after SIGTERM, s.")
    hosts: Names = Field((), description="Hosts that media may be downloaded from: a.example,*.b.example.")
    origins: Names = Field((), description="Other sites whose pages may use the API: https://a.example,...")

    def media_limits(self, of_model: Limits) -> Limits:
        """The tighter of these limits and the model's own."""
        both = Limits.model_fields.keys() & type(self).model_fields
        return of_model.model_copy(update={name: min(getattr(of_model, name), getattr(self, name)) for name in both})
