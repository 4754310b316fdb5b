"""What commands share that put rows to a trained model: which of its tasks is meant, and a batch of questions."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from finetune.common.errors import DataError, option
from finetune.data.sample import Answer, Message
from finetune.model.bindings import TaskBinding
from finetune.recipe.parts import TaskPart

if TYPE_CHECKING:
    from finetune.model.assistant import Assistant
    from finetune.model.features import MediaView


def task_of(bindings: Mapping[str, TaskBinding], task: str | None) -> tuple[str | None, TaskPart | None]:
    """(name, task) that a model was trained for. Raises DataError if there are several and none is named."""
    refuse_unknown_task(bindings, task)
    if len(bindings) > 1 and task is None:
        raise DataError(f"the model was trained for {', '.join(bindings)}: name one with {option('--task', 'task=')}")
    name = task or next(iter(bindings), None)
    return name, bindings[name].task if name else None


def refuse_unknown_task(bindings: Mapping[str, TaskBinding], task: str | None) -> None:
    """Raises DataError."""
    if task is not None and task not in bindings:
        known = ", ".join(bindings) or "no task that is known"
        raise DataError(f"{option('--task', 'task')} {task}: the model was trained for {known}")


def ask(
    assistant: "Assistant",
    name: str | None,
    questions: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    view: "MediaView | None" = None,
) -> list[Answer]:
    """Answers of the task `name`, or in words where the model knows no task, as one batch. Raises DataError."""
    if name is not None:
        return assistant.ask(name, questions, max_new_tokens=max_new_tokens, view=view)
    return [Answer(text) for text in assistant.answers(questions, max_new_tokens=max_new_tokens, view=view)]
