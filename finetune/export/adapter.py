"""For peft: the adapter folder of a run. Its LLM part is an ordinary PEFT adapter; projectors, fusion and heads next to
it are for `finetune.load`, and peft ignores them.
"""

from collections.abc import Sequence
from pathlib import Path

from finetune.export._contract import EngineAnswers, EngineMissing, ExportedModel, MergedModel, Probe, TargetOptions

COMPARED_MEDIA = ()

Options = TargetOptions


def write(model: MergedModel, folder: Path, options: Options) -> ExportedModel:
    """Copy the adapter folder, and the merged model's generation config, whose end tokens the answers need."""
    import shutil

    from finetune.common.run_folder import read_json

    for path in sorted(model.adapter_folder().iterdir()):
        if path.is_file() and path.suffix != ".md":
            shutil.copyfile(path, folder / path.name)
    shutil.copyfile(model.folder / "generation_config.json", folder / "generation_config.json")
    config = read_json(folder / "adapter_config.json")
    base, revision = config["base_model_name_or_path"], config.get("revision")
    notes = ["peft loads the LLM's part; media need `finetune.load`, which also reads the projectors"]
    if is_local := Path(base).exists():
        notes.append("adapter_config.json names its base as a folder of this machine: other machines need their own")
    reason = f"for {Path(base).name if is_local else base}" + (f" at {revision}" if revision else "")
    return ExportedModel(f"a PEFT adapter ({config['peft_type']})", reason, tuple(notes))


def answer(folder: Path, probes: Sequence[Probe], options: Options, max_new_tokens: int) -> EngineAnswers:
    """In a process that imports peft and transformers, and nothing of this package. Raises EngineMissing if peft can't
    load the base by its name.
    """
    from finetune.export._check.ask import BaseModelSpec, QuestionFile
    from finetune.export._check.process import answers_of_process
    from finetune.model.language_model import default_device, load_tokenizer, resolve_dtype
    from finetune.model.manifest import AdapterManifest
    from finetune.model.tokenize import template_options

    llm = AdapterManifest.read(folder).model.language_model
    if llm.name.endswith(".gguf"):
        raise EngineMissing(f"its base is {llm.name}: peft takes folders and Hub names, no GGUF files")
    device = default_device()
    base = BaseModelSpec(
        template_options=template_options(load_tokenizer(str(folder))),
        dtype=str(resolve_dtype(llm.dtype, device)).removeprefix("torch."),
        quantize=llm.quantize,
        double_quantize=llm.double_quantize,
        device=str(device),
    )
    chats = [[{"role": m.role, "content": "".join(map(str, m.content))} for m in probe.messages] for probe in probes]
    return answers_of_process(folder, QuestionFile(chats=chats, max_new_tokens=max_new_tokens, base=base))
