"""What commands share that put rows to a trained model: which of its tasks is meant, and a batch of questions."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from pydantic import ValidationError

from finetune.common.errors import DataError, RecipeError
from finetune.common.run_folder import RunFolder
from finetune.data.sample import Answer, Message, media_in
from finetune.model.bindings import TaskBinding
from finetune.recipe.load import Recipe
from finetune.recipe.parts import TaskPart
from finetune.recipe.schema import Source, chosen_task, task_names
from finetune.recipe.yaml_reader import read_text, read_yaml

if TYPE_CHECKING:
    from finetune.model.assistant import Assistant
    from finetune.model.features import MediaView


def task_of(bindings: Mapping[str, TaskBinding], task: str | None) -> tuple[str | None, TaskPart | None]:
    """(name, task) that a model was trained for. Raises RecipeError if there are several and none is named."""
    name = chosen_task([*bindings], task)
    return name, bindings[name].task if name else None


def ask_each(
    assistant: "Assistant", name: str | None, questions: Mapping[str, Sequence[Message]], *, max_new_tokens: int
) -> dict[str, Answer | DataError]:
    """An answer to each question, or why there is none: what can't be asked doesn't spoil the others' batch."""
    from finetune.model.assistant import FileView

    view = FileView(assistant.encoders, assistant.limits)
    answers: dict[str, Answer | DataError] = {}
    for key, question in questions.items():
        try:
            for medium in media_in(question):
                if medium.kind not in assistant.encoders:
                    kinds = ", ".join(assistant.encoders) or "text only"
                    raise DataError(f"holds {medium.kind}, but this model reads {kinds}")
                view.layout(medium)  # decodes it
        except DataError as error:
            answers[key] = error
    return answers | _in_batches(
        {key: question for key, question in questions.items() if key not in answers},
        lambda batch: ask(assistant, name, batch, max_new_tokens=max_new_tokens, view=view),
    )


def _in_batches(
    questions: Mapping[str, Sequence[Message]], answers_to: Callable[[list[Sequence[Message]]], list[Answer]]
) -> dict[str, Answer | DataError]:
    """As one batch; if that is refused, one by one, as a single question may be too long."""
    if not questions:
        return {}
    try:
        return dict(zip(questions, answers_to([*questions.values()]), strict=True))
    except DataError as error:
        if len(questions) == 1:
            return dict.fromkeys(questions, error)
    return {key: _in_batches({key: question}, answers_to)[key] for key, question in questions.items()}


def source_of_run(run: RunFolder, task: str | None) -> Source | None:
    """The first source of a task in a run's recipe; None where there is no recipe, or one that can't be read."""
    if not run.recipe.is_file():
        return None
    with suppress(RecipeError, ValidationError):
        recipe = Recipe.without_files(read_yaml(read_text(str(run.recipe)), str(run.recipe)).value)
        return next((s for s, name in zip(recipe.data, task_names(recipe.data), strict=True) if name == task), None)
    return None


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
