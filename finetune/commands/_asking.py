"""What commands share that put rows to a trained model: which of its tasks is meant, and a batch of questions."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from finetune.data.sample import Answer, Message
from finetune.model.bindings import TaskBinding
from finetune.recipe.parts import TaskPart
from finetune.recipe.schema import chosen_task

if TYPE_CHECKING:
    from finetune.model.assistant import Assistant
    from finetune.model.features import MediaView


def task_of(bindings: Mapping[str, TaskBinding], task: str | None) -> tuple[str | None, TaskPart | None]:
    """(name, task) that a model was trained for. Raises RecipeError if there are several and none is named."""
    name = chosen_task([*bindings], task)
    return name, bindings[name].task if name else None


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
