"""Chat: questions to a run, a merged folder or an adapter folder."""

from collections.abc import Mapping
from pathlib import Path

from finetune.common.errors import DataError
from finetune.common.progress import quiet_libraries
from finetune.data.sample import Medium, Message
from finetune.model.assistant import Assistant, Media, media_of
from finetune.model.load import load

SHOWN_LABELS = 5


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
    """Answer one prompt; without one, chat at the terminal until an empty line. Returns the last answer.

    `image`, `audio`, `video`: one or several files for the first question. `task`: the name of a trained task whose
    head gives labels with probabilities, or a number; one such task alone needs no name. `strength`: as in
    `Assistant.answer`. Raises DataError, ArtifactError.
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
        turn, answer = _answer(assistant, turns, task, max_new_tokens, strength)
        if prompt is not None:
            break
        print(answer)
        turns.append(Message("assistant", (turn,)))
        first = ()
    return answer


def _answer(
    assistant: Assistant,
    turns: list[Message],
    task: str | None,
    max_new_tokens: int,
    strength: float | Mapping[str, float] | None,
) -> tuple[str, str]:
    """The text of the assistant's turn, and the text to print."""
    names = assistant.names_without_text()
    if task is None and len(names) == len(assistant.model.asks) == 1:
        task = names[0]
    if task is None:
        text = assistant.answers([turns], max_new_tokens=max_new_tokens, strength=strength)[0]
        return text, text
    response = assistant.ask(task, [turns], max_new_tokens=max_new_tokens, strength=strength)[0]
    likely = sorted((response.probabilities or {}).items(), key=lambda item: -item[1])[:SHOWN_LABELS]
    labels = ", ".join(f"{label}: {probability:.3f}" for label, probability in likely)
    return response.text or labels, "  ".join(filter(None, [response.text, labels]))


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
