"""For transformers: one of its own classes if one holds the model exactly, else the kit's own class."""

from collections.abc import Sequence
from pathlib import Path

from finetune.data.sample import KINDS, media_in
from finetune.export._contract import EngineAnswers, ExportedModel, MergedModel, Probe, TargetOptions

COMPARED_MEDIA = KINDS
OWN_CLASS = "MultimodalForConditionalGeneration"
MODULE = "finetune.model.auto"  # registers it
NOT_COPIED = ("certificate.json", "README.md")  # of a merged folder: they describe other files

Options = TargetOptions


def write(model: MergedModel, folder: Path, options: Options) -> ExportedModel:
    """Write a folder for transformers' Auto classes; the own class needs `import finetune.model.auto` first."""
    import torch

    from finetune.export._base import copy_base, is_base
    from finetune.export._native import NotExact, write_native
    from finetune.model.load import load_merged

    if is_base(model.folder):
        return ExportedModel(copy_base(model.folder, folder), "the base is one of transformers' own classes")
    try:
        native = write_native(load_merged(model.folder, torch.device("cpu")), folder)
    except NotExact as error:
        write_own_class(model.folder, folder)
        return ExportedModel(
            OWN_CLASS,
            str(error),
            (f"to load it in transformers: `import {MODULE}` first, then AutoModelForImageTextToText.from_pretrained",),
            {"module": MODULE},
        )
    return ExportedModel(native.name, "it fits exactly: the same tokens, and logits within rounding")


def write_own_class(merged: Path, folder: Path) -> None:
    """The merged folder, with a processor."""
    import shutil

    from finetune.common.run_folder import read_json, write_json
    from finetune.model.processor import MultimodalProcessor

    for path in merged.iterdir():
        if path.is_file() and path.name not in NOT_COPIED:
            shutil.copyfile(path, folder / path.name)
    write_json(folder / "config.json", read_json(merged / "config.json") | {"architectures": [OWN_CLASS]})
    MultimodalProcessor.from_pretrained(merged).save_pretrained(folder)


def answer(folder: Path, probes: Sequence[Probe], options: Options, max_new_tokens: int) -> EngineAnswers:
    """In a process that imports transformers, and of this package at most `finetune.model.auto`."""
    from finetune.common.run_folder import read_json
    from finetune.export._check.ask import QuestionFile
    from finetune.export._check.probes import as_chat
    from finetune.export._check.process import answers_of_process

    chats = [as_chat(probe.messages, {m: str(m.path) for m in media_in(probe.messages)}) for probe in probes]
    own_class = read_json(folder / "config.json")["architectures"] == [OWN_CLASS]
    questions = QuestionFile(chats=chats, max_new_tokens=max_new_tokens)
    return answers_of_process(folder, questions, [MODULE] if own_class else [])
