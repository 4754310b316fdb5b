"""Chat: questions to a run, a merged folder or an adapter folder."""

from collections.abc import Mapping
from pathlib import Path

from finetune.assistant import Media, load, media_of
from finetune.data.sample import Medium, Message
from finetune.errors import DataError
from finetune.progress import quiet_libraries


def chat(
    folder: Path | str,
    prompt: str | None = None,
    image: Media = None,
    audio: Media = None,
    video: Media = None,
    *,
    strength: float | Mapping[str, float] | None = None,
    max_new_tokens: int = 256,
) -> str:
    """Answer one prompt; without one, talk at the terminal until an empty line. Returns the last answer.

    `image`, `audio`, `video`: a file or several, which the (first) question is about. `strength`: as in
    `Assistant.answer`.
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
        answer = assistant.answers([turns], max_new_tokens=max_new_tokens, strength=strength)[0]
        if prompt is not None:
            break
        print(answer)
        turns.append(Message("assistant", (answer,)))
        first = ()
    return answer


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
