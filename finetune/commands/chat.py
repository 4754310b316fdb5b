"""Chat: questions to a run, a merged folder or an adapter folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.common.errors import DataError
from finetune.common.progress import quiet_libraries
from finetune.data.sample import Medium, Message
from finetune.model.assistant import Assistant, Media, media_of
from finetune.model.load import load

SHOWN = 5  # labels


def chat(
    folder: Path | str,
    prompt: str | None = None,
    image: Media = None,
    audio: Media = None,
    video: Media = None,
    *,
    task: str | None = None,
    strength: float | Mapping[str, float] | None = None,
    max_new_tokens: int = 256,
) -> str:
    """Answer one prompt; without one, talk at the terminal until an empty line. Returns the last answer.

    `image`, `audio`, `video`: a file or several, which the (first) question is about. `task`: answer as what was
    trained under this name: by its labels with their probabilities, or a number; where nothing else was trained it
    needn't be named. `strength`: as in `Assistant.answer`.
    """
    quiet_libraries()
    first: tuple[Medium, ...] = media_of(image=image, audio=audio, video=video)
    for medium in first:
        if not medium.path.is_file():
            raise DataError(f"no such {medium.kind}: {medium.path}")
    assistant = load(folder)
    turns: list[Message] = []
    answer = ""
    while (question := _ask() if prompt is None else prompt) or prompt is not None:
        turns.append(Message("user", (*first, question)))
        said, answer = _answer(assistant, turns, task, {"max_new_tokens": max_new_tokens, "strength": strength})
        if prompt is not None:
            break
        print(answer)
        turns.append(Message("assistant", (said,)))
        first = ()
    return answer


def _answer(assistant: Assistant, turns: list[Message], task: str | None, how: dict[str, Any]) -> tuple[str, str]:
    """What the assistant's turn is, and how it is shown."""
    names = assistant.names_without_text()
    if task is None and len(names) == len(assistant.model.asks) == 1:
        task = names[0]
    if task is None:
        return (assistant.answers([turns], **how)[0],) * 2
    said = assistant.ask(task, [turns], **how)[0]
    likely = sorted((said.probabilities or {}).items(), key=lambda one: -one[1])[:SHOWN]
    shown = ", ".join(f"{label}: {chance:.3f}" for label, chance in likely)
    return said.text or shown, "  ".join(filter(None, [said.text, shown]))


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
