"""For llama.cpp (https://github.com/ggml-org/llama.cpp) and Ollama: the LLM in one GGUF file, encoders and projectors
in another, a Modelfile beside them. llama.cpp's own converter and quantizer write the LLM: its folder must be at hand.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from finetune.common.errors import ExportRefused
from finetune.common.registry import PartOptions
from finetune.export._contract import Answered, EngineMissing, Probe, Source, Written

LLM, MEDIA, MODELFILE = "model.gguf", "mmproj.gguf", "Modelfile"
# As told for F32: llama.cpp keeps keys and values in 16 bit otherwise, whatever the weights are.
EXACT = ["--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32"]
FINE, COARSE = ("F32", "F16", "BF16", "Q8_0"), 0.6


class Options(PartOptions):
    quantization: str = Field(
        "Q8_0",
        pattern=r"^[A-Z][A-Z0-9_]*$",
        description="Type of the LLM's weights, by llama.cpp's name: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, ... "
        "Encoders and projectors are kept in 16 bit; with F32 in 32.",
    )
    min_equal: float = Field(
        0.9,
        ge=0,
        le=1,
        description="Share of questions whose first tokens in llama.cpp must be ours; else it is refused. "
        f"Types coarser than Q8_0: {COARSE} if it isn't given.",
    )
    llama_cpp: str | None = Field(
        None,
        description="Folder of llama.cpp: its sources, with its programs in build/bin; null: that of the variable "
        "FINETUNE_LLAMA_CPP, and programs from the PATH.",
        json_schema_extra={"path": "maybe"},
    )
    start_seconds: float = Field(300.0, gt=0, description="How long llama-server may take to start, while comparing.")

    @model_validator(mode="before")
    @classmethod
    def _coarse(cls, given: Any) -> Any:
        return given if given.get("quantization", "Q8_0") in FINE else {"min_equal": COARSE, **given}


def write(source: Source, folder: Path, options: Options) -> Written:
    """Write model.gguf, mmproj.gguf and Modelfile. Raises ExportRefused for what llama.cpp can't run as trained."""
    import torch

    from finetune.export._gguf.language_model import CONVERTED, write_language_model
    from finetune.export._gguf.media import readers_of, write_media
    from finetune.export._gguf.modelfile import modelfile
    from finetune.export._gguf.programs import program, sources_of
    from finetune.model.load import load_merged

    sources = sources_of(options.llama_cpp)
    try:
        quantizer = "" if options.quantization in CONVERTED else program("llama-quantize", options.llama_cpp)
    except EngineMissing as error:
        raise ExportRefused(f"gguf: {options.quantization} needs it: {error}") from None
    assistant = load_merged(source.merged, torch.device("cpu"))
    readers = readers_of(assistant.model)
    if readers:
        write_media(readers, folder / MEDIA, half=options.quantization != "F32")
    write_language_model(
        assistant,
        folder / LLM,
        name=(source.adapter or source.merged).parent.name,
        sources=sources,
        quantizer=quantizer,
        quantization=options.quantization,
    )
    files = [name for name in (LLM, MEDIA) if (folder / name).is_file()]
    text, left_out = modelfile(assistant, files)
    (folder / MODELFILE).write_text(text, encoding="utf-8")
    serve = "llama-server -m FOLDER/model.gguf" + (" --mmproj FOLDER/mmproj.gguf" if readers else "")
    serve = " ".join([serve, *(EXACT if options.quantization == "F32" else [])])
    notes = [f"serve it with: {serve}", "or: ollama create NAME -f FOLDER/Modelfile" + left_out]
    if "audio" in readers:
        notes.append("llama.cpp hears sound of at most 30 s as trained, and very quiet sound a little otherwise")
    types = {name: reader.projector_type for name, reader in readers.items()}
    return Written(
        f"{assistant.model.config.text_config.model_type} {options.quantization}",
        " and ".join(f"{name} by llama.cpp's projector {kind!r}" for name, kind in types.items()) or "text only",
        tuple(notes),
        {"projector_types": types, "quantization": options.quantization, "command": serve},
    )


def answer(folder: Path, probes: Sequence[Probe], options: Options, max_new_tokens: int) -> Answered:
    """Ask a llama-server of its own, over OpenAI's API. Raises EngineMissing, ExportRefused."""
    from finetune.export._check.openai_server import ask, serving
    from finetune.export._gguf.programs import program, version_of

    executable = program("llama-server", options.llama_cpp)
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    arguments = [executable, "-m", str(folder / LLM), "--parallel", "1", "--threads", threads]
    arguments += EXACT if options.quantization == "F32" else []
    if (folder / MEDIA).is_file():
        arguments += ["--mmproj", str(folder / MEDIA)]
    ends = ends_of(folder / LLM)
    answers = []
    with serving("llama-server", arguments, options.start_seconds) as server:
        for probe in probes:
            told = ask(server, probe.messages, max_new_tokens, logprobs=True, cache_prompt=False)
            tokens = tuple(token["id"] for token in (told.get("logprobs") or {"content": []})["content"])
            answers.append(tokens[:-1] if tokens[-1:] and tokens[-1] in ends else tokens)
    return Answered(f"llama.cpp {version_of(executable)}", tuple(answers))


def ends_of(path: Path) -> set[int]:
    """Ids of the tokens that end an answer, as the file names them."""
    import gguf

    fields = gguf.GGUFReader(path).fields
    names = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot"))
    return {int(fields[name].contents()) for name in names if name in fields}
