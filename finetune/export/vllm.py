"""For vLLM (https://docs.vllm.ai): a class of transformers if one holds the model exactly, else the kit's own class.
Both run in vLLM's transformers backend, which takes any attention-based LLM with its own logit scale, cap and bias.

The kit's own class is no remote code: vLLM finds it by an entry point of this package, which must be installed in
vLLM's environment, without its dependencies.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from finetune.common.errors import ExportRefused
from finetune.export._contract import EngineAnswers, ExportedModel, MergedModel, Probe, TargetOptions, without_end

BACKEND = "TransformersMultiModalForCausalLM"  # vLLM's transformers backend for models that take media
COMPARED_MEDIA = ("image", "audio")  # and what composites are served with
MODEL = "exported"  # its name in the API during verification
ADAPTER = "adapter"  # the adapter's folder, and its name in the API
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of adapters that vLLM reserves room for
QWEN2_ONLY = ("AudioFlamingo3ForConditionalGeneration",)  # classes of vLLM that load any other LLM's weights wrongly
REFUSED = {
    "Qwen2AudioForConditionalGeneration": "doesn't run in vLLM's transformers backend, and vLLM's own class takes no "
    "LLM but Qwen2"
}


class Options(TargetOptions):
    python: str | None = Field(
        None,
        description="The python of vLLM's environment; null: that of the variable FINETUNE_VLLM.",
        json_schema_extra={"path": "maybe"},
    )
    adapter: bool = Field(
        False,
        description="Write the adapter separately from its base, which includes the projectors, for a server of "
        "several adapters; needs a run with plain LoRA.",
    )
    start_seconds: float = Field(600.0, gt=0, description="Longest start of vLLM during verification.")


def write(model: MergedModel, folder: Path, options: Options) -> ExportedModel:
    """Write what `vllm serve FOLDER` loads. Raises ExportRefused for what its transformers backend can't run."""
    import torch

    from finetune.common.run_folder import read_json, write_json
    from finetune.export._base import copy_base, is_base, write_first_token
    from finetune.export._native import NotExact, write_native
    from finetune.export._vllm.adapter import subtract_adapter, write_adapter
    from finetune.export._vllm.environment import INSTALL_PLUGIN
    from finetune.export._vllm.folder import write_served
    from finetune.model.load import load_merged

    if is_base(model.folder):
        if options.adapter:
            raise ExportRefused("vllm: the option `adapter` isn't for bases: export without it")
        name = copy_base(model.folder, folder)
        write_first_token(folder)
        config = for_vllm(read_json(folder / "config.json"))
        write_json(folder / "config.json", config)
        is_own = config["architectures"] == [name]
        why = "vLLM's own class of this name" if is_own else "vLLM's own class takes no LLM but Qwen2"
        command = f"vllm serve FOLDER --dtype {config['dtype']}"
        return ExportedModel(name, why, (f"to serve it: {command}",), {"command": command})
    assistant = load_merged(model.folder, torch.device("cpu"))
    if (reason := unsupported(assistant.model)) is not None:
        raise ExportRefused(f"{model.folder}: vLLM can't serve it: {reason}; `finetune serve` does")
    for encoder in assistant.model.encoders.values():
        drop_pooling(encoder)
    command = f"vllm serve FOLDER --dtype {str(assistant.model.causal_lm.dtype).removeprefix('torch.')}"
    if options.adapter:
        adapter = model.adapter_folder()
        rank = lora_rank(read_json(adapter / "adapter_config.json"))
        assistant.model.language_model = subtract_adapter(assistant.model.causal_lm, adapter)
        write_adapter(assistant.model.causal_lm, adapter, folder / ADAPTER)
        command += f" --enable-lora --max-lora-rank {rank} --lora-modules {ADAPTER}=FOLDER/{ADAPTER}"
        reason = f"the adapter is separate from its base, and is called {ADAPTER!r}"
    else:
        try:
            native = write_native(assistant, folder, REFUSED)
        except NotExact as error:
            reason = str(error)
        else:
            write_json(folder / "config.json", read_json(folder / "config.json") | {"architectures": [BACKEND]})
            return ExportedModel(native.name, "it fits exactly", (f"to serve it: {command}",), {"command": command})
    write_served(assistant, folder, BACKEND)
    notes = (INSTALL_PLUGIN, f"to serve it: {command}")
    return ExportedModel("ServedModel", reason, notes, {"command": command})


def for_vllm(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a base. vLLM reads in the LLM's part whether input and output embeddings are one, where a base may
    have it beside the LLM's; with them tied and the file without them, it would answer from an empty output layer.
    """
    text = dict(config.get("text_config", {}))
    if text and config.get("tie_word_embeddings"):
        text["tie_word_embeddings"] = True
        config = config | {"text_config": text}
    if config["architectures"][0] in QWEN2_ONLY and text["model_type"] != "qwen2":
        config = config | {"architectures": [BACKEND]}
    return config


def unsupported(composite: Any) -> str | None:
    """Why vLLM can't run a composite, or None."""
    composition, text = composite.composition, composite.config.text_config
    if unknown := [name for name in composition.encoders if name not in COMPARED_MEDIA]:
        return f"its transformers backend takes {' and '.join(COMPARED_MEDIA)}, no {unknown[0]}"
    if composition.fusion.kind != "prefix":
        return f"it has no place for the fusion {composition.fusion.kind!r}"
    if composite.heads:
        return f"it has no place for a head with weights ({', '.join(composite.heads)})"
    if not composite.causal_lm._supports_attention_backend:
        return f"vLLM can't replace the attention of this LLM ({text.model_type}) by its own"
    if max(getattr(text, name, 0) or 0 for name in ("num_experts", "num_local_experts", "n_routed_experts")) > 1:
        return f"the LLM ({text.model_type}) is a mixture of experts, which this export doesn't write yet"
    return None


def lora_rank(config: dict[str, Any]) -> int:
    """The rank that vLLM must reserve room for. `config`: of adapter_config.json. Raises ExportRefused for an adapter
    that vLLM can't apply.
    """
    largest = max([config["r"], *config.get("rank_pattern", {}).values()])
    unsupported_keys = [name for name in ("use_dora", "modules_to_save", "lora_bias") if config.get(name)]
    if unsupported_keys or largest > RANKS[-1]:
        reason = unsupported_keys or f"rank {largest}"
        raise ExportRefused(f"vLLM takes plain LoRA up to rank {RANKS[-1]}; this adapter has {reason}")
    return next(rank for rank in RANKS if rank >= largest)


def drop_pooling(encoder: Any) -> None:
    """Remove the head that makes one vector of a picture (SigLIP, AIMv2): features are read before it, and vLLM can't
    run it on a CPU.
    """
    for module in encoder.modules():
        if getattr(module, "use_head", False):
            del module.head
            module.use_head = False
    for name in ("vision_use_head", "use_head"):
        if hasattr(encoder.config, name):
            setattr(encoder.config, name, False)


def answer(folder: Path, probes: Sequence[Probe], options: Options, max_new_tokens: int) -> EngineAnswers:
    """In a vLLM server, over OpenAI's API."""
    from finetune.common.run_folder import read_json
    from finetune.export._check.openai_server import answer_ids, serving
    from finetune.export._vllm import environment

    config = read_json(folder / "config.json")
    end_ids = read_json(folder / "generation_config.json").get("eos_token_id")
    end_ids = end_ids if isinstance(end_ids, list) else [end_ids]
    python = environment.find_python(options.python)
    version = environment.version_of(python, plugin=config["model_type"] == "finetune_served")
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder.absolute())]
    # No longer prompts than there is memory for, and nothing compiled: these are few and short questions.
    command += ["--dtype", config["dtype"], "--max-model-len", "auto", "--enforce-eager"]
    command += ["--served-model-name", MODEL]
    name = MODEL
    if (folder / ADAPTER).is_dir():
        name, rank = ADAPTER, lora_rank(read_json(folder / ADAPTER / "adapter_config.json"))
        command += ["--enable-lora", "--max-lora-rank", str(rank)]
        command += ["--lora-modules", f"{ADAPTER}={(folder / ADAPTER).absolute()}"]
    # Without it the LLM's generation config may set another penalty.
    fields = {"model": name, "repetition_penalty": 1.0, "return_token_ids": True}
    with serving("vLLM", command, options.start_seconds, environment.server_environment(python)) as server:
        answers = [
            answer_ids(server, probe.messages, max_new_tokens, lambda body: body["choices"][0]["token_ids"], **fields)
            for probe in probes
        ]
    return EngineAnswers(f"vLLM {version}", tuple(without_end(answer, end_ids) for answer in answers))
