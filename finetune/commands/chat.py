"""Chat: questions to a run, a merged folder or an adapter folder."""

import sys

from finetune.common.errors import DataError, escaped
from finetune.common.progress import quiet_libraries
from finetune.common.run_folder import RunLike
from finetune.data.questions import worded
from finetune.data.sample import Answer, Medium, Message
from finetune.model.assistant import MediaInput, Strength, media_of
from finetune.model.load import load
from finetune.recipe.parts import TaskPart

SHOWN_LABELS = 5


def chat(
    folder: RunLike,
    prompt: str | None = None,
    image: MediaInput = None,
    audio: MediaInput = None,
    video: MediaInput = None,
    *,
    task: str | None = None,
    strength: Strength = None,
    max_new_tokens: int = 256,
) -> str:
    """Answer one prompt; without one, chat at the terminal until an empty line. Returns the last answer.

    `image`, `audio`, `video`: media for the first question, and `strength`: as in `Assistant.answer`. `task`: the name
    of a trained task whose head gives labels with probabilities, or a number; one such task alone needs no name. The
    first question is put as the task puts it, with its fields; stderr says what else its questions read.
    Raises DataError, ArtifactError.
    """
    quiet_libraries()
    first: tuple[Medium, ...] = media_of(image=image, audio=audio, video=video)
    for medium in first:
        if medium.content is None and not medium.path.is_file():
            raise DataError(f"no such {medium.kind}: {medium.path}")
    assistant = load(folder)
    task = task or assistant.only_task()

    def answer_to(turns: list[Message]) -> Answer:
        if task is None:
            return Answer(assistant.answers([turns], max_new_tokens=max_new_tokens, strength=strength)[0])
        return assistant.ask(task, [turns], max_new_tokens=max_new_tokens, strength=strength)[0]

    bindings = assistant.model.bindings
    name = task or (next(iter(bindings)) if len(bindings) == 1 else "")
    trained_for = bindings[name].task if name in bindings else None
    if trained_for:
        _say_what_was_trained(trained_for, prompt)
        if trained_for.media and not first:
            kinds = " and ".join(trained_for.media)
            print(f"trained on questions about {kinds}: without any, the answer is invented", file=sys.stderr)
    turns: list[Message] = []
    text = ""
    while (question := _ask() if prompt is None else prompt) or prompt is not None:
        asked = worded(question, trained_for).text if trained_for and question and not turns else question
        turns.append(Message("user", (*first, asked)))
        answer = answer_to(turns)
        text = as_text(answer)
        if prompt is not None:
            break
        print(escaped(text))
        turns.append(Message("assistant", (answer.text or text,)))
        first = ()
    return text


def _say_what_was_trained(task: TaskPart, prompt: str | None) -> None:
    """To stderr, where the question is another one than those of training, or reads less."""
    trained = getattr(task.options, "prompt", "")
    if columns := worded(trained or "?", task).columns:
        names = ", ".join(map(repr, columns))
        print(f"trained on questions that begin with the text of {names}: write it before yours", file=sys.stderr)
    if trained and prompt != "" and not getattr(task.options, "question", "") and trained not in (prompt or ""):
        print(f"trained on the question {trained!r}", file=sys.stderr)


def as_text(answer: Answer) -> str:
    """The answer, and the likeliest labels behind it."""
    likeliest = sorted((answer.probabilities or {}).items(), key=lambda item: -item[1])[:SHOWN_LABELS]
    labels = ", ".join(f"{label}: {probability:.3f}" for label, probability in likeliest)
    return "  ".join(filter(None, [answer.text, labels]))


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
