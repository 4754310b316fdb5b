"""For vLLM (https://docs.vllm.ai): a class of transformers where one fits exactly, the kit's own elsewhere; both run in
vLLM's transformers backend, which takes any attention-based LLM with its own logit scale, cap and bias.

The kit's own class is no remote code: vLLM finds it by an entry point of this package, which must be installed beside
it, without what it depends on: `pip install --no-deps finetune`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from finetune.common.errors import ExportRefused
from finetune.common.registry import PartOptions
from finetune.export._contract import Answered, Probe, Source, Written

BACKEND = "TransformersMultiModalForCausalLM"  # vLLM's name of its transformers backend, for models that take media
TAKEN = ("image", "audio")
MODEL = "exported"  # its name in the API, while comparing
ADAPTER = "adapter"  # its folder, and the name by which it is asked
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of adapters that vLLM makes room for
LEFT_OUT = {
    "Qwen2AudioForConditionalGeneration": "doesn't run in vLLM's transformers backend, and vLLM's own knows no LLM but "
    "Qwen2"
}


class Options(PartOptions):
    min_equal: float = Field(
        0.9, ge=0, le=1, description="Share of questions whose first tokens in vLLM must be ours; else it is refused."
    )
    python: str | None = Field(
        None,
        description="The python of the environment that has vLLM; null: that of the variable FINETUNE_VLLM.",
        json_schema_extra={"path": "maybe"},
    )
    adapter: bool = Field(
        False,
        description="Leave the adapter beside its base, projectors in it, for a server of several adapters; it takes a "
        "run, with plain LoRA.",
    )
    start_seconds: float = Field(600.0, gt=0, description="How long vLLM may take to start, while comparing.")


def write(source: Source, folder: Path, options: Options) -> Written:
    """Write what `vllm serve FOLDER` takes. Raises ExportRefused for what its transformers backend can't run."""
    import torch

    from finetune.common.run_folder import read_json, write_json
    from finetune.export._native import Native, NotExact, native_of, write_native
    from finetune.export._vllm.adapter import take_out, write_adapter
    from finetune.export._vllm.folder import write_served
    from finetune.model.load import load_merged

    assistant = load_merged(source.merged, torch.device("cpu"))
    if (reason := lacking(assistant.model)) is not None:
        raise ExportRefused(f"{source.merged}: vLLM can't serve it: {reason}; `finetune serve` does")
    for tower in assistant.model.encoders.values():
        drop_pooling(tower)
    dtype = str(assistant.model.causal_lm.dtype).removeprefix("torch.")
    command = f"vllm serve FOLDER --dtype {dtype}"
    install = "in vLLM's environment, once: pip install --no-deps finetune"
    if options.adapter:
        if source.adapter is None:
            raise ExportRefused(f"{source.merged}: a merged folder holds no adapter: name the run that it came from")
        if not (source.adapter / "adapter_config.json").is_file():
            raise ExportRefused(f"{source.adapter}: this run trained no adapter (`adapter: null`), only other parts")
        rank = lora_rank(read_json(source.adapter / "adapter_config.json"))
        assistant.model.language_model = take_out(assistant.model.causal_lm, source.adapter)
        write_adapter(assistant.model.causal_lm, source.adapter, folder / ADAPTER)
        write_served(assistant, folder, BACKEND)
        command += f" --enable-lora --max-lora-rank {rank} --lora-modules {ADAPTER}=FOLDER/{ADAPTER}"
        why = f"the adapter stands beside its base, and answers as {ADAPTER!r}"
        return Written("ServedModel", why, (install, f"to serve it: {command}"), {"command": command})
    native = native_of(assistant.model)
    if isinstance(native, Native) and native.model_class in LEFT_OUT:
        native = f"{native.model_class} {LEFT_OUT[native.model_class]}"
    if isinstance(native, Native):
        try:
            write_native(assistant, folder, native)
            config = read_json(folder / "config.json")
            write_json(folder / "config.json", config | {"architectures": [BACKEND]})
            notes = (f"to serve it: {command}",)
            return Written(native.model_class, "it fits exactly", notes, {"command": command})
        except NotExact as error:
            native = str(error)
    for left in folder.iterdir():
        left.unlink()
    write_served(assistant, folder, BACKEND)
    return Written("ServedModel", native, (install, f"to serve it: {command}"), {"command": command})


def lacking(model: Any) -> str | None:
    """Why vLLM can't run a composite, or None."""
    parts = model.config.parts
    if unknown := [name for name in parts["encoders"] if name not in TAKEN]:
        return f"its transformers backend takes {' and '.join(TAKEN)}, no {unknown[0]}"
    if parts["fusion"]["kind"] != "prefix":
        return f"it has no place for the fusion {parts['fusion']['kind']!r}"
    if model.heads:
        return f"it has no place for a head of its own ({', '.join(model.heads)})"
    text = model.config.text_config
    if not model.causal_lm._supports_attention_backend:
        return f"the LLM ({text.model_type}) computes attention in its own way, which vLLM can't replace by its own"
    if max(getattr(text, name, 0) or 0 for name in ("num_experts", "num_local_experts", "n_routed_experts")) > 1:
        return f"the LLM ({text.model_type}) is a mixture of experts, which this export doesn't write yet"
    return None


def lora_rank(config: dict[str, Any]) -> int:
    """For what rank vLLM must make room. Raises ExportRefused for an adapter that it can't put over a base."""
    largest = max([config["r"], *config.get("rank_pattern", {}).values()])
    wrong = [name for name in ("use_dora", "modules_to_save", "lora_bias") if config.get(name)]
    if wrong or largest > RANKS[-1]:
        raise ExportRefused(f"vLLM takes plain LoRA up to rank {RANKS[-1]}; this adapter has {wrong or largest}")
    return next(rank for rank in RANKS if rank >= largest)


def drop_pooling(tower: Any) -> None:
    """Take off the head that makes one vector of a picture (SigLIP, AIMv2): features come from before it, and on a CPU
    vLLM can't run it.
    """
    for module in tower.modules():
        if getattr(module, "use_head", False):
            del module.head
            module.use_head = False
    for name in ("vision_use_head", "use_head"):
        if hasattr(tower.config, name):
            setattr(tower.config, name, False)


def answer(folder: Path, probes: Sequence[Probe], options: Options, max_new_tokens: int) -> Answered:
    """Ask a vLLM of its own, over OpenAI's API. Raises EngineMissing, ExportRefused."""
    from finetune.common.run_folder import read_json
    from finetune.export._check.openai_server import ask, serving
    from finetune.export._vllm import environment as environment

    config = read_json(folder / "config.json")
    ends = read_json(folder / "generation_config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    python = environment.python_of(options.python)
    version = environment.version_of(python, plugin=config["model_type"] == "finetune_served")
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder.absolute())]
    # No longer prompts than there is memory for, and nothing compiled: these are few and short questions.
    command += ["--dtype", config["dtype"], "--max-model-len", "auto", "--enforce-eager"]
    model = MODEL
    if (folder / ADAPTER).is_dir():
        model, rank = ADAPTER, lora_rank(read_json(folder / ADAPTER / "adapter_config.json"))
        command += ["--enable-lora", "--max-lora-rank", str(rank)]
        command += ["--lora-modules", f"{ADAPTER}={(folder / ADAPTER).absolute()}"]
    command += ["--served-model-name", MODEL]
    # Else the LLM's generation config may say otherwise.
    how = {"model": model, "repetition_penalty": 1.0, "return_token_ids": True}
    answers = []
    with serving("vLLM", command, options.start_seconds, environment.environment_of(python)) as server:
        for probe in probes:
            ids = ask(server, probe.messages, max_new_tokens, **how)["token_ids"]
            answers.append(tuple(ids[:-1] if ids[-1:] and ids[-1] in ends else ids))
    return Answered(f"vLLM {version}", tuple(answers))
