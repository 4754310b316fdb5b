"""For transformers: one of its own classes where one fits exactly, the kit's own elsewhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from finetune.common.registry import PartOptions
from finetune.export._contract import Answered, Probe, Source, Written

if TYPE_CHECKING:
    from finetune.data.sample import Medium

OWN = "MultimodalForConditionalGeneration"
LEFT = ("certificate.json", "README.md")  # of a merged folder: they tell of other files


class Options(PartOptions):
    min_equal: float = Field(
        0.9, ge=0, le=1, description="Share of questions whose first tokens must be ours; else it is refused."
    )


def write(source: Source, folder: Path, options: Options) -> Written:
    """Write what transformers' Auto classes load, the own class after `import finetune.model.auto`."""
    import torch

    from finetune.export._native import NotExact, native_of, write_native
    from finetune.model.load import load_merged

    assistant = load_merged(source.merged, torch.device("cpu"))
    native = native_of(assistant.model)
    if not isinstance(native, str):
        try:
            write_native(assistant, folder, native)
            return Written(native.model_class, "it fits exactly: the same tokens, and logits within rounding")
        except NotExact as error:
            native = str(error)
    del assistant
    write_own(source.merged, folder)
    notes = ("`import finetune.model.auto` comes before the Auto classes",)
    return Written(OWN, native, notes, {"module": "finetune.model.auto"})


def write_own(merged: Path, folder: Path) -> None:
    """The merged folder as the kit's own class, with its processor, in place of whatever stands in `folder`."""
    import shutil

    from finetune.common.run_folder import read_json, write_json
    from finetune.model.processor import MultimodalProcessor

    for found in folder.iterdir():
        found.unlink()
    for path in merged.iterdir():
        if path.is_file() and path.name not in LEFT:
            shutil.copyfile(path, folder / path.name)
    write_json(folder / "config.json", read_json(merged / "config.json") | {"architectures": [OWN]})
    MultimodalProcessor.from_pretrained(merged).save_pretrained(folder)


def answer(folder: Path, probes: Sequence[Probe], options: Options, max_new_tokens: int) -> Answered:
    """Ask a process that imports transformers, and of this package `finetune.model.auto` at most."""
    import tempfile

    from finetune.common.run_folder import read_json
    from finetune.export._check.probes import as_chat, media_of
    from finetune.export._check.process import asked_in_process

    architectures = read_json(folder / "config.json")["architectures"]
    parts = read_json(folder / "config.json").get("parts", {})
    with tempfile.TemporaryDirectory() as place:
        chats = []
        for number, probe in enumerate(probes):
            media = list(dict.fromkeys(media_of(probe.messages)))
            given = {m: decoded_file(m, Path(place) / f"{number}-{i}", parts) for i, m in enumerate(media)}
            chats.append(as_chat(probe.messages, given))
        questions = {"chats": chats, "max_new_tokens": max_new_tokens}
        modules = ["finetune.model.auto"] if architectures == [OWN] else []
        return asked_in_process(folder, questions, modules)


def decoded_file(medium: "Medium", path: Path, parts: dict[str, Any]) -> str:
    """A picture or recording, decoded by us and kept without loss: other decoders turn, scale and mix otherwise."""
    import numpy as np

    from finetune.data.media import decode
    from finetune.recipe.schema import Limits

    if medium.kind not in ("image", "audio"):  # only the kit's own class takes it, and decodes it the same way
        return str(medium.path.absolute())
    decoded = decode(medium.kind, medium.path, limits=Limits(**parts.get("media", {})))
    if medium.kind == "image":
        decoded.save(path := path.with_suffix(".png"))
    else:
        np.save(path := path.with_suffix(".npy"), decoded)
    return str(path)
