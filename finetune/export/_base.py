"""A merged base is a class of transformers already: its folder is copied, for transformers and engines that read it."""

import shutil
from pathlib import Path

from finetune.common.errors import ExportRefused
from finetune.common.run_folder import read_json
from finetune.model.composition import BASE_FILE, HEADS_FILE

NOT_COPIED = ("certificate.json", "README.md", BASE_FILE)  # they describe other files, or are ours


def is_base(merged: Path) -> bool:
    return (merged / BASE_FILE).is_file()


def copy_base(merged: Path, folder: Path) -> str:
    """Copy a merged base; the name of its class. Raises ExportRefused for heads that it would lose."""
    if (merged / HEADS_FILE).is_file():
        raise ExportRefused(f"{merged}: it has a head with weights, which other engines would leave out")
    for path in merged.iterdir():
        if path.is_file() and path.name not in NOT_COPIED:
            shutil.copyfile(path, folder / path.name)
    return str(read_json(folder / "config.json")["architectures"][0])


def write_first_token(folder: Path) -> None:
    """Let the chat template write the token that the processor puts before every prompt, as LLaVA's does: vLLM
    tokenizes a rendered template without it. Where the template writes it, transformers' processors add none.
    """
    from transformers import AutoTokenizer

    tokenizer, file = AutoTokenizer.from_pretrained(folder), folder / "chat_template.jinja"
    first, template = tokenizer.bos_token, file.read_text(encoding="utf-8")
    written = first is None or "bos_token" in template or first in template
    if not written and tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
        file.write_text("{{ bos_token }}" + template, encoding="utf-8")
