"""Task bindings: a task, the head that answers it, and what the head learned from the training rows, under one name."""

from collections.abc import Sequence
from typing import Any

from finetune.common.errors import DataError
from finetune.data.sample import Answer, Sample
from finetune.model.heads import HeadSettings
from finetune.recipe.parts import HeadPart, TaskPart
from finetune.recipe.schema import Section, Source, task_names


class TaskBinding(Section, strict=False):
    """All sources of one name have the same; saved with the model as JSON."""

    task: TaskPart
    head: HeadPart
    settings: HeadSettings = HeadSettings()

    @property
    def trained(self) -> bool:
        """Whether the head has weights of its own: it then reads the state at the end of the question."""
        return self.head.trained

    def target(self, sample: Sample) -> Any:
        """What the sample's prediction is scored against."""
        return sample.target if sample.target is not None else self.task.read(Answer(sample.answer))

    def encode(self, sample: Sample) -> list[float]:
        """What a head with weights learns from the sample. Raises DataError."""
        try:
            target: list[float] = self.head.module.encode(self.target(sample), self.settings)
            return target
        except DataError as error:
            raise DataError(f"{sample.where}: {error}") from None


def bindings_of(sources: Sequence[Source], training: Sequence[Sample]) -> dict[str, TaskBinding]:
    """{name: task binding}, with what the heads learn from the training rows. Raises DataError."""
    from finetune.data.rows import answers_of, of_task  # an engine that loads a binding reads no rows

    bindings: dict[str, TaskBinding] = {}
    for source, name in zip(sources, task_names(sources), strict=True):
        if name in bindings:
            continue
        if source.head.trained:
            refuse_reserved(name)
        untrained = TaskBinding(task=source.task, head=source.head)
        own = of_task(training, name)
        targets = (untrained.target(sample) for sample in own) if source.head.trained else answers_of(own)
        try:
            settings = source.head.module.settings(targets, source.head.options)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        bindings[name] = TaskBinding(task=source.task, head=source.head, settings=settings)
    return bindings


def refuse_reserved(name: str) -> None:
    """Raises DataError for a name that torch modules reserve."""
    from torch import nn

    if hasattr(nn.ModuleDict, name):
        raise DataError(f"name: a head can't be called {name!r}, which torch uses; write another `name`, as {name}-is")
