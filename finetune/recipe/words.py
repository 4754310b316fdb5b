"""Words that messages about recipes are made of."""

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

Location = tuple[str | int, ...]


Problem = tuple[Location, str]


MAX_DEPTH = 20


def below(value: Any, step: str | int) -> Any:
    known = step in value if isinstance(value, dict) else isinstance(value, list) and step in range(len(value))
    return value[step] if known else None


def nearest(word: str, words: Iterable[str]) -> str | None:
    spellings = {other.lower().replace("-", "_"): other for other in words}
    near = difflib.get_close_matches(word[:100].lower().replace("-", "_"), spellings, n=1)
    return spellings[near[0]] if near else None


def shorten(text: object, width: int = 60) -> str:
    """Text on one line, cut in its middle."""
    line = "".join(character if character.isprintable() else "?" for character in str(text))
    return line if len(line) <= width else f"{line[: width // 2]}...{line[-(width // 2 - 3) :]}"


def dotted(location: Location) -> str:
    return ".".join(shorten(step, 40) for step in location)


def seen(value: Any) -> str:
    if isinstance(value, str):
        return f"'{shorten(value)}'"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "null" if value is None else str(value).lower()


def problem(message: str) -> PydanticCustomError:
    """For a validator to raise: its text is the message as it is."""
    return PydanticCustomError("recipe", "{message}", {"message": message})


def problem_at(cls: type, location: tuple[str, ...], message: str, value: Any) -> ValidationError:
    detail = InitErrorDetails(type=problem(message), loc=location, input=value)
    return ValidationError.from_exception_data(cls.__name__, [detail])
