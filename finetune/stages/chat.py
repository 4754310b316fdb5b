"""Chat: one question to a run, a merged folder or an adapter folder."""

from pathlib import Path

from finetune.assistant import load
from finetune.data.sample import Medium, Message
from finetune.errors import DataError
from finetune.progress import quiet_libraries


def chat(
    folder: Path | str, prompt: str | None = None, image: Path | str | None = None, max_new_tokens: int = 256
) -> str:
    """Answer one prompt; without one, talk at the terminal until an empty line. Returns the last answer."""
    quiet_libraries()
    if image is not None and not Path(image).is_file():
        raise DataError(f"no such image: {image}")
    assistant = load(folder)
    if prompt is not None:
        return assistant.answer(prompt, image=image, max_new_tokens=max_new_tokens)
    turns: list[Message] = []
    first: tuple[Medium, ...] = (Medium("image", Path(image)),) if image else ()
    answer = ""
    while question := _ask():
        turns.append(Message("user", (*first, question)))
        answer = assistant.answers([turns], max_new_tokens=max_new_tokens)[0]
        print(answer)
        turns.append(Message("assistant", (answer,)))
        first = ()
    return answer


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
