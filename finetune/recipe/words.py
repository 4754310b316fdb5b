"""What messages about recipes are made of."""

from typing import NamedTuple

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

MAX_DEPTH = 20  # levels of a recipe

Location = tuple[str | int, ...]  # keys and indices from the root: ("data", 0, "path")


class Problem(NamedTuple):
    location: Location
    message: str


def shorten(text: object, width: int = 60) -> str:
    """Text on one line, cut in its middle."""
    line = "".join(character if character.isprintable() else "?" for character in str(text))
    return line if len(line) <= width else f"{line[: width // 2]}...{line[-(width // 2 - 3) :]}"


def dotted(location: Location) -> str:
    return ".".join(shorten(step, 40) for step in location)


def describe(value: object) -> str:
    """A value as messages show it: 'text', 7, true, null, a mapping, an empty list."""
    if isinstance(value, str):
        return f"'{shorten(value)}'"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "null" if value is None else str(value).lower()


def problem(message: str) -> PydanticCustomError:
    """For a validator to raise; the message is shown as it is."""
    return PydanticCustomError("recipe", "{message}", {"message": message})


def problem_at(cls: type, location: tuple[str, ...], message: str, value: object) -> ValidationError:
    """The same, about a key below the value that is validated."""
    detail = InitErrorDetails(type=problem(message), loc=location, input=value)
    return ValidationError.from_exception_data(cls.__name__, [detail])
