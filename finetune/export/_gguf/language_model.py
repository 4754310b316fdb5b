"""The LLM of a composite as a GGUF file, by llama.cpp's own converter and quantizer."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.common.errors import ExportRefused
from finetune.common.run_folder import read_json, write_json
from finetune.export._check.process import last_line
from finetune.model.assistant import Assistant
from finetune.model.tokenize import answer_tokens, template_options

CONVERTER_TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "q8_0"}  # written without the quantizer
SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
# {llama.cpp's name for a pre-tokenizer: its steps in tokenizer.json}, for tokenizers whose hash the converter doesn't
# know, such as newly trained ones.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
PRE_TOKENIZERS: dict[str, list[dict[str, object]]] = {
    "gpt-2": [BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES],
}


def write_language_model(
    assistant: Assistant, path: Path, name: str, sources: Path, quantizer: str | None, quantization: str
) -> None:
    """`name`: of the model, in the file. `sources`: llama.cpp's folder. `quantizer`: the path of `llama-quantize`; None
    for CONVERTER_TYPES.

    Raises ExportRefused with llama.cpp's message if it can't write this LLM.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        folder = Path(scratch) / "llm"
        _save_plain(assistant, folder)
        convert_folder(folder, path, name, sources, quantizer, quantization)


def convert_folder(
    folder: Path,
    path: Path,
    name: str,
    sources: Path,
    quantizer: str | None,
    quantization: str,
    *,
    media: bool = False,
) -> None:
    """A folder of transformers as a GGUF file; `media`: of its encoders and projectors. Raises ExportRefused."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    converted = path.with_name("unquantized.gguf") if quantizer else path
    pre_tokenizer = _pre_tokenizer(read_json(folder / "tokenizer.json"))
    config = read_json(folder / "config.json")
    dtype = str(config.get("dtype"))
    outtype = CONVERTER_TYPES.get(quantization) or SHORT.get(dtype, "f32")
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("text_config", {}).get("model_type"), "")
    script = [sys.executable, str(Path(__file__).with_name("convert.py")), str(sources), pre_tokenizer, architecture]
    options = ["--outfile", str(converted), "--outtype", outtype, "--model-name", name]
    _run([*script, str(folder), *options, *(["--mmproj"] if media else [])])
    if quantizer:
        _run([quantizer, str(converted), str(path), quantization])
        converted.unlink()


def _save_plain(assistant: Assistant, folder: Path) -> None:
    """Save the LLM alone, in transformers' form. Its tokenizer goes without the placeholders: llama.cpp marks media
    itself, and their ids may lie beyond the LLM's table.
    """
    model, tokenizer = assistant.model.causal_lm, assistant.tokenizer
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = {placeholder.id for placeholder in assistant.placeholders.values()}
    tokens = {placeholder.token for placeholder in assistant.placeholders.values()}
    content = read_json(folder / "tokenizer.json")
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] not in ids]
    write_json(folder / "tokenizer.json", content)
    settings = read_json(folder / "tokenizer_config.json")
    added = settings.get("added_tokens_decoder", {})
    settings["added_tokens_decoder"] = {key: token for key, token in added.items() if int(key) not in ids}
    for name in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(settings.get(name), list):
            settings[name] = [token for token in settings[name] if token not in tokens]
    settings["add_bos_token"] = False  # if the prompt begins with it, the chat template writes it
    end = answer_tokens("b", tokenizer)[-1]
    write_json(folder / "tokenizer_config.json", settings | {"eos_token": tokenizer.convert_ids_to_tokens(end)})
    for name in ("config.json", "generation_config.json"):
        write_json(folder / name, read_json(folder / name) | {"eos_token_id": end})
    (folder / "chat_template.jinja").write_text(chat_template(tokenizer), encoding="utf-8")


def chat_template(tokenizer: Any) -> str:
    """The template as trained with, independent of `enable_thinking`, which llama.cpp's server sets."""
    if "enable_thinking" not in tokenizer.chat_template:
        template: str = tokenizer.chat_template
        return template
    value = "false" if template_options(tokenizer) else "undefined_as_in_training"
    return f"{{%- set enable_thinking = {value} -%}}{tokenizer.chat_template}"


def _pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json; '' if it isn't one of PRE_TOKENIZERS."""
    pre_tokenizer = tokenizer.get("pre_tokenizer") or {}
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    if tokenizer.get("normalizer") or tokenizer["model"].get("type") != "BPE":
        return ""
    for name, known in PRE_TOKENIZERS.items():
        if len(steps) == len(known) and all(k.items() <= s.items() for k, s in zip(known, steps, strict=True)):
            return name
    return ""


def _run(command: list[str]) -> None:
    process = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if process.returncode:
        raise ExportRefused(f"gguf: llama.cpp can't write this LLM: {last_line(process)}")
