"""Rows for media without any, written by an endpoint or a model in this process: captions, questions with answers."""

import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.commands._asking import ask_each
from finetune.common.errors import DataError, RecipeError, given
from finetune.common.run_folder import RunLike
from finetune.data.describe.assignment import Assignment
from finetune.data.describe.endpoint import Endpoint, is_address
from finetune.data.describe.options import DescribeOptions
from finetune.data.describe.run import Descriptions, MediaFolder, ModelAnswer, describe
from finetune.data.sample import KINDS, Message
from finetune.model.trained_for import fingerprint, folder_of_model, parts_at, refuse_missing

if TYPE_CHECKING:
    from finetune.model.assistant import Assistant

OUT = "described.jsonl"


def data_describe(
    folder: Path | str,
    model: RunLike,
    out: Path | str | None = None,
    *,
    task: str = "caption",
    prompt: str | None = None,
    questions: int | None = None,
    options: DescribeOptions | None = None,
) -> Descriptions:
    """Ask a model about each medium of a folder, and write its answers as rows that the `task` reads: caption,
    transcribe, answer or vqa. `out`: default FOLDER/described.jsonl. Called again, it describes the files that have no
    rows.

    `model`: a run, merged or adapter folder, a Hub id, or the http(s) address of an OpenAI-compatible endpoint.
    `prompt`: in place of the usual one, or of the one that the model was trained with. `questions`: how many the model
    writes and answers about each file; without it, the `prompt` is the question.

    Raises RecipeError; DataError for an `out` with other rows, and where many files one after another get no answer;
    ModelError, ArtifactError for the model.
    """
    options = options or DescribeOptions()
    options.refuse_unusable()
    assignment = Assignment(task, prompt, questions, options.language)
    assignment.refuse_unusable()
    path = Path(folder)
    target = Path(out) if out is not None else path / OUT
    if target.suffix.lower() != ".jsonl":
        raise RecipeError(f"{given('out', target)}: write a file that ends in .jsonl")
    kinds = ("audio",) if task == "transcribe" else KINDS
    if is_address(address := os.fspath(model)):
        media = MediaFolder.read(path, target.parent, kinds, options.media)
        return describe(media, target, Endpoint(address, options), assignment, options)
    refuse_missing(model)
    if parts := parts_at(model):  # so that a mistake is reported before torch is imported
        MediaFolder.read(path, target.parent, [kind for kind in kinds if kind in parts.placeholders], options.media)
    local = LocalModel(model, options)
    media = MediaFolder.read(
        path, target.parent, [kind for kind in kinds if kind in local.assistant.encoders], options.media
    )
    return describe(media, target, local, replace(assignment, prompt=prompt or local.trained_prompt(task)), options)


class LocalModel:
    """A model loaded in this process."""

    address = ""

    def __init__(self, model: RunLike, options: DescribeOptions) -> None:
        from finetune.common.progress import quiet_libraries
        from finetune.model.load import load

        quiet_libraries()
        self.assistant: Assistant = load(model)
        folder = folder_of_model(Path(model))
        self.name, self.revision = os.fspath(model), fingerprint(folder) if folder.is_dir() else ""
        self.options = options

    def trained_prompt(self, task: str) -> str | None:
        """Of a caption or transcript, as the model was trained to write them."""
        tasks = [binding.task for binding in self.assistant.model.bindings.values()]
        known = [getattr(one.options, "prompt", None) for one in tasks if one.kind == task]
        return known[0] if known and task in ("caption", "transcribe") else None

    def answers(self, questions: Mapping[str, Sequence[Message]]) -> Generator[tuple[str, ModelAnswer | DataError]]:
        names, batch = list(questions), self.options.concurrency
        for start in range(0, len(names), batch):
            chunk = {name: questions[name] for name in names[start : start + batch]}
            for name, answer in ask_each(
                self.assistant, None, chunk, max_new_tokens=self.options.max_new_tokens
            ).items():
                result = answer if isinstance(answer, DataError) else ModelAnswer(answer.text, self.name, self.revision)
                yield name, result
