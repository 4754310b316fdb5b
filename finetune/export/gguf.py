"""For llama.cpp (https://github.com/ggml-org/llama.cpp) and Ollama: a GGUF file of the LLM, one of encoders and
projectors, and a Modelfile. llama.cpp's own converter and quantizer write the LLM, so its folder is needed.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from finetune.common.errors import ExportRefused
from finetune.export._contract import (
    EngineAnswers,
    EngineMissing,
    ExportedModel,
    MergedModel,
    Probe,
    TargetOptions,
    without_end,
)

COMPARED_MEDIA = ("image", "audio")
LLM, MEDIA, MODELFILE = "model.gguf", "mmproj.gguf", "Modelfile"
# For F32: by default llama.cpp keeps keys and values in 16 bit, whatever the type of the weights.
EXACT = ["--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32"]
FINE_TYPES, COARSE_MIN_EQUAL = ("F32", "F16", "BF16", "Q8_0"), 0.6


class Options(TargetOptions):
    quantization: str = Field(
        "Q8_0",
        pattern=r"^[A-Z][A-Z0-9_]*$",
        description="Type of the LLM's weights, by llama.cpp's name: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, ... "
        "Encoders and projectors are kept in 16 bit; with F32 in 32 bit. With types coarser than Q8_0 the default of "
        f"`min_equal` is {COARSE_MIN_EQUAL}.",
    )
    llama_cpp: str | None = Field(
        None,
        description="llama.cpp's folder: its sources, with its programs in build/bin; null: that of the variable "
        "FINETUNE_LLAMA_CPP, and programs from the PATH.",
        json_schema_extra={"path": "maybe"},
    )
    start_seconds: float = Field(300.0, gt=0, description="Longest start of llama-server during verification.")

    @model_validator(mode="before")
    @classmethod
    def _min_equal_of_coarse_types(cls, values: Any) -> Any:
        is_fine = values.get("quantization", "Q8_0") in FINE_TYPES
        return values if is_fine else {"min_equal": COARSE_MIN_EQUAL, **values}


def write(model: MergedModel, folder: Path, options: Options) -> ExportedModel:
    """Write model.gguf, mmproj.gguf and Modelfile. Raises ExportRefused for what llama.cpp can't run as trained."""
    import torch

    from finetune.export._base import is_base
    from finetune.export._gguf.language_model import CONVERTER_TYPES, write_language_model
    from finetune.export._gguf.media import media_models, write_media
    from finetune.export._gguf.modelfile import modelfile
    from finetune.export._gguf.programs import find_program, find_sources
    from finetune.model.load import load_merged

    sources = find_sources(options.llama_cpp)
    try:
        is_direct = options.quantization in CONVERTER_TYPES
        quantizer = None if is_direct else find_program("llama-quantize", options.llama_cpp)
    except EngineMissing as error:
        raise ExportRefused(f"gguf: {options.quantization} needs it: {error}") from None
    name = (model.adapter or model.folder).parent.name
    if is_base(model.folder):
        return _write_base(model, folder, name, sources, quantizer, options)
    assistant = load_merged(model.folder, torch.device("cpu"))
    media = media_models(assistant.model)
    if media:
        write_media(media, folder / MEDIA, half=options.quantization != "F32")
    write_language_model(assistant, folder / LLM, name, sources, quantizer, options.quantization)
    text, note = modelfile(assistant, [LLM, MEDIA] if media else [LLM])
    (folder / MODELFILE).write_text(text, encoding="utf-8")
    command = "llama-server -m FOLDER/model.gguf" + (" --mmproj FOLDER/mmproj.gguf" if media else "")
    command = " ".join([command, *(EXACT if options.quantization == "F32" else [])])
    notes = [f"serve it with: {command}", "or: ollama create NAME -f FOLDER/Modelfile" + note]
    if "audio" in media:
        notes.append("recordings over 30 s are cut differently from training, and very quiet ones differ slightly")
    types = {kind: part.projector_type for kind, part in media.items()}
    return ExportedModel(
        f"{assistant.model.config.text_config.model_type} {options.quantization}",
        " and ".join(f"{kind} by llama.cpp's projector {type_!r}" for kind, type_ in types.items()) or "text only",
        tuple(notes),
        {"projector_types": types, "quantization": options.quantization, "command": command},
    )


def _write_base(
    model: MergedModel, folder: Path, name: str, sources: Path, quantizer: str | None, options: Options
) -> ExportedModel:
    """By llama.cpp's converter alone, which writes both files. Raises ExportRefused with its message."""
    import tempfile

    from finetune.export._base import copy_base
    from finetune.export._gguf.base_template import write_template
    from finetune.export._gguf.language_model import convert_folder

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        native = Path(scratch)
        architecture = copy_base(model.folder, native)
        write_template(native, architecture)
        convert_folder(native, folder / LLM, name, sources, quantizer, options.quantization)
        media_type = "F32" if options.quantization == "F32" else "F16"
        convert_folder(native, folder / MEDIA, name, sources, None, media_type, media=True)
    command = "llama-server -m FOLDER/model.gguf --mmproj FOLDER/mmproj.gguf"
    details = {"quantization": options.quantization, "command": command}
    reason = f"{architecture} by llama.cpp's own converter"
    return ExportedModel(f"{architecture} {options.quantization}", reason, (f"serve it with: {command}",), details)


def answer(folder: Path, probes: Sequence[Probe], options: Options, max_new_tokens: int) -> EngineAnswers:
    """In a llama-server, over OpenAI's API."""
    from finetune.export._check.openai_server import answer_ids, serving
    from finetune.export._gguf.programs import find_program, version_of

    executable = find_program("llama-server", options.llama_cpp)
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    command = [executable, "-m", str(folder / LLM), "--parallel", "1", "--threads", threads]
    command += EXACT if options.quantization == "F32" else []
    if (folder / MEDIA).is_file():
        command += ["--mmproj", str(folder / MEDIA)]
    end_ids = end_tokens(folder / LLM)
    # `logprobs` leave out tokens that are parts of a character.
    fields = {"verbose": True, "return_tokens": True, "cache_prompt": False}
    with serving("llama-server", command, options.start_seconds) as server:
        answers = [
            answer_ids(server, probe.messages, max_new_tokens, lambda body: body["__verbose"]["tokens"], **fields)
            for probe in probes
        ]
    ended = tuple(without_end(answer, end_ids) for answer in answers)
    return EngineAnswers(f"llama.cpp {version_of(executable)}", ended)


def end_tokens(path: Path) -> list[int]:
    """Ids of the tokens that end an answer, as the GGUF file names them."""
    import gguf

    fields = gguf.GGUFReader(path).fields
    names = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot"))
    return [int(fields[name].contents()) for name in names if name in fields]
