"""For peft: the run's adapter folder by itself. Its LLM part is an ordinary PEFT adapter; projectors, fusion and heads
lie beside it, for `finetune.load`, and peft leaves them alone.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from finetune.common.errors import ExportRefused
from finetune.common.registry import PartOptions
from finetune.export._contract import Answered, EngineMissing, Probe, Source, Written

TAKES_MEDIA = False  # peft knows of none


class Options(PartOptions):
    min_equal: float = Field(
        0.9,
        ge=0,
        le=1,
        description="Share of questions, asked without their media, whose first tokens must be the merged model's.",
    )


def write(source: Source, folder: Path, options: Options) -> Written:
    """Copy the adapter folder, and the generation config that its answers need to end."""
    import shutil

    from finetune.common.run_folder import read_json

    if source.adapter is None:
        raise ExportRefused(f"{source.merged}: a merged folder holds no adapter: name the run that it came from")
    if not (source.adapter / "adapter_config.json").is_file():
        raise ExportRefused(f"{source.adapter}: this run trained no adapter (`adapter: null`), only other parts")
    for path in sorted(source.adapter.iterdir()):
        if path.is_file() and path.suffix != ".md":
            shutil.copyfile(path, folder / path.name)
    shutil.copyfile(source.merged / "generation_config.json", folder / "generation_config.json")
    config = read_json(folder / "adapter_config.json")
    base, revision = config["base_model_name_or_path"], config.get("revision")
    notes = ["peft loads the LLM's part; media need `finetune.load`, which reads the projectors beside it"]
    if local := Path(base).exists():
        notes.append("adapter_config.json names its base as a folder of this machine: others name their own copy")
    why = f"for {Path(base).name if local else base}" + (f" at {revision}" if revision else "")
    return Written(f"a PEFT adapter ({config['peft_type']})", why, tuple(notes))


def answer(folder: Path, probes: Sequence[Probe], options: Options, max_new_tokens: int) -> Answered:
    """Ask a process that imports peft and transformers, and of this package nothing. Raises EngineMissing where peft
    can't have the base by its name.
    """
    from finetune.common.run_folder import read_json
    from finetune.export._check.process import asked_in_process
    from finetune.model.language_model import default_device, load_tokenizer, resolve_dtype
    from finetune.model.tokenize import template_options

    llm = read_json(folder / "multimodal.json")["language_model"]
    if llm["name"].endswith(".gguf"):
        raise EngineMissing(f"its base is {llm['name']}: peft takes folders and Hub names, no GGUF files")
    device = default_device()
    base = {
        "template": template_options(load_tokenizer(str(folder))),
        "dtype": str(resolve_dtype(llm["dtype"], device)).removeprefix("torch."),
        "quantize": llm["quantize"],
        "double_quantize": llm["double_quantize"],
        "device": str(device),
    }
    chats = [[{"role": m.role, "content": "".join(map(str, m.content))} for m in probe.messages] for probe in probes]
    return asked_in_process(folder, {"chats": chats, "max_new_tokens": max_new_tokens, "peft": base})
