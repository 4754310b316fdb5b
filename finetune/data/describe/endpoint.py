"""A model behind an OpenAI-compatible endpoint, called by OpenAI's own client, which repeats failed requests."""

import base64
import io
import math
import mimetypes
import os
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from finetune.common.display import data_uri
from finetune.common.errors import DataError, ModelError, RecipeError, given, option
from finetune.data.describe.options import DescribeOptions
from finetune.data.describe.run import ModelAnswer
from finetune.data.media import decode
from finetune.data.media.audio import RATE
from finetune.data.sample import Medium, Message
from finetune.recipe.schema import Limits

if TYPE_CHECKING:
    from PIL.Image import Image

INSTALL = "an endpoint is called by OpenAI's client: pip install 'finetune-kit[describe]'"
QUALITY = 90  # of JPEG


def is_address(model: str) -> bool:
    return model.startswith(("http://", "https://"))


class Endpoint:
    """`address`: with or without /v1; `model`: its name there. Raises RecipeError for an address or a name that can't
    be meant, ModelError where nothing answers.
    """

    def __init__(self, address: str, options: DescribeOptions) -> None:
        try:
            import openai
        except ImportError:
            raise RecipeError(INSTALL) from None
        url = urlsplit(address)
        if not url.hostname or url.username or url.password or url.query:
            raise RecipeError(f"{given('model', address)}: write http://HOST:PORT/v1; a key comes by a variable")
        self.address = address.rstrip("/") + ("/v1" if url.path in ("", "/") else "")
        self.options, self.limits = options, Limits()
        self.client = openai.OpenAI(
            base_url=self.address,
            api_key=os.environ.get(options.key_variable) or "none",
            max_retries=options.retries,
            timeout=options.timeout_seconds,
        )
        self.settings: Any = {"temperature": 0, "max_tokens": options.max_new_tokens}
        self.model = options.model_name or self._only_model()

    def _only_model(self) -> str:
        names: list[str] = [model.id for model in self._called(lambda: self.client.models.list())]
        if len(names) != 1:
            there = f"{', '.join(names[:10]) or 'none'}{', ...' * (len(names) > 10)}"
            raise RecipeError(f"{self.address} serves {there}: name one with {option('--model-name', 'model_name=')}")
        return names[0]

    def answers(self, questions: Mapping[str, Sequence[Message]]) -> Generator[tuple[str, ModelAnswer | DataError]]:
        """Answers in the order in which they arrive. Raises ModelError where no request can succeed."""
        with ThreadPoolExecutor(self.options.concurrency) as pool:
            futures = {pool.submit(self._answer, question): name for name, question in questions.items()}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, question: Sequence[Message]) -> ModelAnswer | DataError:
        try:
            content = [{"role": turn.role, "content": self._parts(turn)} for turn in question]
            return self._answer_in(self._called(lambda: self._request(content)))
        except DataError as error:
            return error

    def _request(self, messages: Any) -> Any:
        import openai

        settings = self.settings
        try:
            return self.client.chat.completions.create(model=self.model, messages=messages, **settings)
        except openai.BadRequestError as error:
            if self.settings is settings:  # else another thread has changed them meanwhile
                refused = error.param or ""
                if refused not in {"temperature", "max_tokens"} & settings.keys():
                    raise
                self.settings = _without(settings, refused)
        return self._request(messages)

    def _called(self, request: Any) -> Any:
        """Raises ModelError for errors that any request would meet, DataError for those that may be this one's."""
        import openai

        try:
            return request()
        except openai.APIConnectionError as error:
            if isinstance(error, openai.APITimeoutError):
                raise DataError(f"no answer after {self.options.timeout_seconds:g} s") from None
            raise ModelError(f"{self.address}: nothing answers there ({error.__cause__ or error})") from None
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            key = f"; its key is read from the variable {self.options.key_variable}" if error.status_code == 401 else ""
            raise ModelError(f"{self.address} answers {error.status_code}: {_reason(error)}{key}") from None
        except openai.APIStatusError as error:
            tries = f" after {self.options.retries + 1} tries" if error.status_code >= 429 else ""
            raise DataError(f"the endpoint answers {error.status_code}{tries}: {_reason(error)}") from None
        except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"the endpoint's answer can't be read ({_reason(error)})") from None

    def _answer_in(self, response: Any) -> ModelAnswer:
        """Raises DataError."""
        try:
            choice = response.choices[0]
            text, reason = choice.message.content, choice.finish_reason
        except (AttributeError, IndexError, TypeError):
            raise DataError(f"the endpoint's answer can't be read: {str(response)[:80]!r}") from None
        if reason == "length":
            limit = option("--max-new-tokens", "max_new_tokens=")
            raise DataError(f"cut off after {self.options.max_new_tokens} tokens; raise {limit}")
        if not isinstance(text, str):
            raise DataError(f"no text in the endpoint's answer (it ended by {reason})")
        state = getattr(response, "system_fingerprint", None)
        return ModelAnswer(text.strip(), str(getattr(response, "model", None) or self.model), state or "")

    def _parts(self, turn: Message) -> list[dict[str, Any]]:
        """Raises MediaError."""
        parts: list[dict[str, Any]] = []
        for part in turn.content:
            parts += [{"type": "text", "text": part}] if isinstance(part, str) else self._medium(part)
        return parts

    def _medium(self, medium: Medium) -> list[dict[str, Any]]:
        frames = self.options.frames
        if medium.kind == "video" and not frames:
            decode("video", medium.path, limits=self.limits, count=1)  # within its limits
            kind = mimetypes.guess_type(medium.path.name)[0] or "video/mp4"
            return [_address("video_url", data_uri(kind, Path(medium.path).read_bytes()))]
        if medium.kind == "video":
            pictures = decode("video", medium.path, limits=self.limits, count=frames).frames
            return [_address("image_url", self._picture(picture)) for picture in pictures]
        decoded = decode(medium.kind, medium.path, limits=self.limits)
        if medium.kind == "image":
            return [_address("image_url", self._picture(decoded))]
        return [{"type": "input_audio", "input_audio": {"data": _wave(decoded), "format": "wav"}}]

    def _picture(self, picture: "Image") -> str:
        """A data URI of at most `max_pixels` pixels."""
        scale = math.sqrt(self.options.max_pixels / (picture.width * picture.height))
        if scale < 1:
            picture = picture.resize((max(1, int(picture.width * scale)), max(1, int(picture.height * scale))))
        content = io.BytesIO()
        picture.save(content, "jpeg", quality=QUALITY)
        return data_uri("image/jpeg", content.getvalue())


def _without(settings: Mapping[str, Any], refused: str) -> dict[str, Any]:
    """Settings without one that reasoning models refuse: they have no temperature, and another length limit."""
    others = {key: value for key, value in settings.items() if key != refused}
    return others | ({"max_completion_tokens": settings[refused]} if refused == "max_tokens" else {})


def _address(kind: str, uri: str) -> dict[str, Any]:
    return {"type": kind, kind: {"url": uri}}


def _wave(samples: Any) -> str:
    """Float32 (samples,) at 16 kHz -> a WAV file in base64."""
    import soundfile

    content = io.BytesIO()
    soundfile.write(content, samples, RATE, format="WAV", subtype="PCM_16")
    return base64.b64encode(content.getvalue()).decode()


def _reason(error: Exception) -> str:
    """An endpoint's error message, in one line."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(message or error).split())[:200]
