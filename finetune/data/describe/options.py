"""Options of `data describe` besides the assignment."""

from dataclasses import dataclass

from finetune.common.errors import RecipeError, given


@dataclass(frozen=True)
class DescribeOptions:
    """`language`: of what the model writes. `media`: the kind of media, where a folder holds several. `limit`: files
    described at most, those of earlier calls included. `concurrency`: files processed at once. `max_new_tokens`: of
    an answer. `overwrite`: begin anew where there is a file.

    Of an endpoint: `model_name` there; `key_variable`: the environment variable with its key; `retries` of a request
    that fails by overload or an error of the endpoint; `timeout_seconds` of a request; `max_pixels`: larger pictures
    are scaled down; `frames`: send so many pictures of a video in place of the file, None: the file.
    """

    language: str = ""
    media: str | None = None
    limit: int | None = None
    concurrency: int = 4
    max_new_tokens: int = 512
    overwrite: bool = False
    model_name: str | None = None
    key_variable: str = "FINETUNE_API_KEY"
    retries: int = 5
    timeout_seconds: float = 120.0
    max_pixels: int = 1_000_000
    frames: int | None = None

    def refuse_unusable(self) -> None:
        """Raises RecipeError."""
        for name in ("limit", "concurrency", "max_new_tokens", "max_pixels", "frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{given(name, value)}: write 1 or more")
        if self.retries < 0 or self.timeout_seconds <= 0:
            raise RecipeError("write 0 retries or more, and a time limit above 0 seconds")
        if self.media not in (None, "image", "audio", "video"):
            raise RecipeError(f"{given('media', self.media)}: write image, audio or video")
