"""The LLM of a composite as a GGUF file, by llama.cpp's own converter and quantizer."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from finetune.common.errors import ExportRefused
from finetune.common.run_folder import read_json, write_json
from finetune.model.assistant import Assistant
from finetune.model.tokenize import answer_tokens, template_options

CONVERTED = {"F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "q8_0"}  # the converter writes these itself
WIDEST = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
# How text is cut before byte pairs are merged, as tokenizer.json says it: llama.cpp's name for it. Asked for tokenizers
# whose hash llama.cpp's converter doesn't know, those that somebody trained anew.
BYTES = {"type": "ByteLevel", "add_prefix_space": False}
CUTS = {
    "gpt-2": [BYTES | {"use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}],
}


def write_language_model(
    assistant: Assistant, path: Path, *, name: str, sources: Path, quantizer: str, quantization: str
) -> None:
    """`name`: what the file calls the model; `sources`: llama.cpp's folder; `quantizer`: its `llama-quantize`.

    Raises ExportRefused where llama.cpp can't write this LLM, with what it says.
    """
    direct = quantization in CONVERTED
    widest = WIDEST.get(assistant.model.causal_lm.dtype, "f32")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        folder, wide = Path(scratch) / "llm", path if direct else Path(scratch) / "wide.gguf"
        _save_plain(assistant, folder)
        script = Path(__file__).with_name("convert.py")
        outtype = CONVERTED.get(quantization, widest)
        cut = _cut_of(read_json(folder / "tokenizer.json"))
        how = ["--outfile", str(wide), "--outtype", outtype, "--model-name", name]
        _run([sys.executable, str(script), str(sources), cut, str(folder), *how])
        if not direct:
            shutil.rmtree(folder)
            _run([quantizer, str(wide), str(path), quantization])


def _save_plain(assistant: Assistant, folder: Path) -> None:
    """An ordinary folder of the LLM alone. Placeholders are left out of the tokenizer: llama.cpp marks media itself,
    and their ids may lie behind the LLM's table.
    """
    model, tokenizer = assistant.model.causal_lm, assistant.tokenizer
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = {placeholder.id for placeholder in assistant.placeholders.values()}
    content = read_json(folder / "tokenizer.json")
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] not in ids]
    write_json(folder / "tokenizer.json", content)
    settings = read_json(folder / "tokenizer_config.json")
    known = settings.get("added_tokens_decoder", {})
    settings["added_tokens_decoder"] = {key: token for key, token in known.items() if int(key) not in ids}
    tokens = {placeholder.token for placeholder in assistant.placeholders.values()}
    for name in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(settings.get(name), list):
            settings[name] = [token for token in settings[name] if token not in tokens]
    settings["add_bos_token"] = False  # where the prompt begins with it, the chat template writes it
    end = answer_tokens("b", tokenizer)[-1]
    write_json(folder / "tokenizer_config.json", settings | {"eos_token": tokenizer.convert_ids_to_tokens(end)})
    for name in ("config.json", "generation_config.json"):
        write_json(folder / name, read_json(folder / name) | {"eos_token_id": end})
    (folder / "chat_template.jinja").write_text(chat_template(tokenizer), encoding="utf-8")


def chat_template(tokenizer: Any) -> str:
    """As trained, whatever a server sets: llama.cpp's sets `enable_thinking`, which is either off or unknown here."""
    off = "false" if template_options(tokenizer) else "not_given"
    known = "enable_thinking" in tokenizer.chat_template
    return (f"{{%- set enable_thinking = {off} -%}}" if known else "") + tokenizer.chat_template


def _cut_of(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer cuts text; '' where it isn't one of CUTS."""
    cutter = tokenizer.get("pre_tokenizer") or {}
    steps = cutter["pretokenizers"] if cutter.get("type") == "Sequence" else [cutter]
    if tokenizer.get("normalizer") or tokenizer["model"].get("type") != "BPE":
        return ""
    for name, wanted in CUTS.items():
        if len(steps) == len(wanted) and all(w.items() <= s.items() for w, s in zip(wanted, steps, strict=True)):
            return name
    return ""


def _run(command: list[str]) -> None:
    """Raises ExportRefused with the last line that the command wrote."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise ExportRefused(f"gguf: llama.cpp can't write this LLM: {(said or ['?'])[-1][:300]}")
