"""Rows of a task as a table or JSON lines hold them, read and answered in one go."""

from pathlib import Path
from types import ModuleType
from typing import Any

from tiny import tiny_picture

from finetune.common.registry import PartOptions, load_part
from finetune.data.sample import Answer, Row, Sample


class Asked:
    """A task with options, whose rows stand in a folder with the picture a.png of 32 x 24 pixels."""

    def __init__(self, name: str, folder: Path, **options: Any) -> None:
        self.task: ModuleType = load_part("tasks", name)
        self.options: PartOptions = self.task.Options(**options)
        self.folder = folder
        tiny_picture().resize((32, 24)).save(folder / "a.png")

    def sample(self, **columns: Any) -> Sample:
        return self.task.sample(
            Row(self.folder / "rows.csv", 2, {"image": "a.png", **columns}, self.folder), self.options
        )

    def question(self, **columns: Any) -> str:
        return "".join(part for part in self.sample(**columns).question[0].content if isinstance(part, str))

    def read(self, text: str = "", **answer: Any) -> Any:
        return self.task.read(Answer(text, **answer), self.options)

    def row(self, sample: Sample, answer: Answer) -> dict:
        target = self.read(sample.answer) if sample.target is None else sample.target
        return self.task.measure(self.task.read(answer, self.options), target, self.options)

    def scores(self, *answered: tuple[Sample, str | Answer]) -> dict[str, float]:
        rows = [self.row(one, Answer(said) if isinstance(said, str) else said) for one, said in answered]
        return self.task.score(rows, self.options)
