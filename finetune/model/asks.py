"""What is asked of some rows, and what its answers are read off: the same for all sources of a name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.common.errors import DataError
from finetune.common.registry import load_part, part_from
from finetune.data.rows import Entry, Source
from finetune.data.sample import Answer, Sample
from finetune.model.heads import HeadSettings


@dataclass(frozen=True)
class Ask:
    """`task`, `head`: (kind, Options). `settings`: what the head learned from the training rows."""

    task: tuple[str, Any]
    head: tuple[str, Any]
    settings: HeadSettings

    @property
    def trained(self) -> bool:
        """Whether the head has weights of its own: it then reads the state at the end of the question."""
        return load_part("heads", self.head[0]).TRAINED

    def save(self) -> dict[str, Any]:
        return {
            "task": {"kind": self.task[0], "options": self.task[1].model_dump(mode="json")},
            "head": {"kind": self.head[0], "options": self.head[1].model_dump(mode="json")},
            "settings": self.settings.model_dump(mode="json", exclude_unset=True),
        }

    @classmethod
    def restore(cls, saved: Mapping[str, Any]) -> "Ask":
        settings = HeadSettings.model_validate(saved["settings"])
        return cls(part_from("tasks", saved["task"]), part_from("heads", saved["head"]), settings)

    def target(self, sample: Sample) -> Any:
        """What the sample's prediction is scored against."""
        kind, options = self.task
        return (
            sample.target
            if sample.target is not None
            else load_part("tasks", kind).read(Answer(sample.answer), options)
        )

    def encode(self, sample: Sample) -> list[float]:
        """What a head with weights learns from the sample. Raises DataError."""
        try:
            return load_part("heads", self.head[0]).encode(self.target(sample), self.settings)
        except DataError as error:
            raise DataError(f"{sample.where}: {error}") from None


def asks_of(sources: Sequence[Source], training: Sequence[Entry]) -> dict[str, Ask]:
    """{name: what is asked under it}, with what the heads learn from the training rows. Raises DataError."""
    asks: dict[str, Ask] = {}
    for source in sources:
        name = name_of(source)
        if name in asks:
            continue
        kind, options = source.head
        head = load_part("heads", kind)
        if head.TRAINED:
            refuse_taken(name)
        ask = Ask(source.task, (kind, options or head.Options()), HeadSettings())
        own = [entry.sample for entry in training if name_of(sources[entry.source]) == name]
        targets = [ask.target(sample) for sample in own] if ask.trained else [sample.answer for sample in own]
        try:
            asks[name] = Ask(ask.task, ask.head, head.settings(targets, ask.head[1]))
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
    return asks


def refuse_taken(name: str) -> None:
    """Raises DataError for a name that a torch module has for its own."""
    from torch import nn

    if hasattr(nn.ModuleDict, name):
        raise DataError(f"name: a head can't be called {name!r}, which torch uses; write another `name`, as {name}-is")


def names_of(entries: Sequence[Entry], sources: Sequence[Source]) -> list[str]:
    """The name of each entry's scores."""
    return [name_of(sources[entry.source]) for entry in entries]


def name_of(source: Source) -> str:
    """What the source's scores are called."""
    return source.name or source.task[0]
