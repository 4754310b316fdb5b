"""The options of a comparison, which each of its processes reads."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.train_vs_trl.workload import Workload, workload

IMAGE_TOKEN = "<|image|>"


@dataclass(frozen=True)
class Options:
    """`folder`: where all processes of the comparison meet. `parts`: weights of the quickstart; `toy`, random ones as
    small as those of tests; `large`, random ones of the shapes of a 7B LLM and SigLIP-so400m; `given`, those that lie
    in `folder` already, llm/ and vision/. `pixels`: side of the pictures, where it isn't the quickstart's.
    `peer_tokens`: that the peer computes at once, about; larger steps are accumulated; None: all of a step.
    """

    workload: str
    folder: Path
    questions: int
    pictures: int
    pixels: int | None
    epochs: int
    tokens_per_batch: int
    parts: str
    device: str
    threads: int
    workers: int
    quantize: str
    rank: int
    learning_rate: float
    seed: int
    peer_tokens: int | None

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def unused_rows(self) -> Path:
        return self.folder / "unused.jsonl"

    @property
    def template(self) -> Path:
        return self.folder / "template.jinja"

    @property
    def first_weights(self) -> Path:
        return self.folder / "first"

    @property
    def chosen(self) -> Workload:
        return workload(self.workload)

    def save(self) -> None:
        (self.folder / "options.json").write_text(json.dumps(asdict(self), default=str), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Options":
        saved = json.loads((folder / "options.json").read_text(encoding="utf-8"))
        return cls(**{**saved, "folder": folder})
