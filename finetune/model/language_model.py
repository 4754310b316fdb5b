"""The LLM part: any causal language model of transformers, by hub id, folder or `.gguf` file, in 4, 8 or 16 bits."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jinja2
import psutil
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from finetune.common.errors import ModelError
from finetune.common.gpu import GIB, computes_bfloat16
from finetune.common.hub import loading
from finetune.model.bounds import refuse_oversized
from finetune.model.template_limit import TemplateTimeout, rendered
from finetune.recipe.schema import Base, LanguageModel

ROOM = 0.75  # of the free memory, for weights that are dequantized once: a step needs the rest
# For base models, whose tokenizers carry no chat template. An answer begins on a new line: a space before it would melt
# into its first token.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)


def default_device() -> torch.device:
    """The accelerator of this process (by LOCAL_RANK under accelerate), or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 where the device computes it, float16 on older GPUs (T4), float32 on CPU."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if computes_bfloat16(device) else torch.float16


def read_config(llm: LanguageModel) -> Any:
    """The LLM's config, without its weights. Raises ModelError."""
    with loading(f"{'base' if isinstance(llm, Base) else 'LLM'} {llm.name!r}", llm.name) as local_only:
        return AutoConfig.from_pretrained(
            **_source(llm.name, llm.revision), trust_remote_code=llm.trust_remote_code, local_files_only=local_only
        )


def _source(name: str, revision: str | None) -> dict[str, Any]:
    """Where transformers reads a config or a tokenizer from: a repository, a folder, or a `.gguf` file."""
    if name.endswith(".gguf"):
        return {"pretrained_model_name_or_path": str(Path(name).parent), "gguf_file": Path(name).name}
    return {"pretrained_model_name_or_path": name, "revision": revision}


def load_language_model(llm: LanguageModel, dtype: torch.dtype, device: torch.device | None = None) -> PreTrainedModel:
    """Load a causal LM, frozen, in evaluation mode.

    `dtype` is that of the weights that aren't quantized and of the computation. A `.gguf` file is read to `dtype`
    first and then quantized like any other. Raises ModelError.
    """
    device = device or default_device()
    options: dict[str, Any] = {
        "revision": llm.revision,
        "dtype": dtype,
        "device_map": {"": device},
        "trust_remote_code": llm.trust_remote_code,
    }
    if llm.attention != "auto":
        options["attn_implementation"] = llm.attention
    refuse_oversized(read_config(llm).to_dict(), f"LLM {llm.name!r}")
    with loading(f"LLM {llm.name!r}", llm.name) as local_only:
        if llm.name.endswith(".gguf"):
            model = _load_gguf(llm, options)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                llm.name,
                use_safetensors=True,
                quantization_config=quantization(llm, dtype),
                local_files_only=local_only,
                adapter_kwargs={"local_files_only": local_only},
                **options,
            )
    compute_in(model, dtype)
    return ready(model, llm)


def ready(model: PreTrainedModel, llm: LanguageModel) -> PreTrainedModel:
    """A loaded LLM, frozen, in evaluation mode. Raises ModelError for one with encoders of its own."""
    if model.config.get_text_config() is not model.config:
        raise ModelError(
            f"LLM {llm.name!r} is a {type(model).__name__}, with encoders of its own; take a text-only model"
        )
    keep_layout(model)
    result: PreTrainedModel = model.eval().requires_grad_(False)
    return result


def load_tokenizer(
    name: str, *, revision: str | None = None, chat_template: Path | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer, with a chat template (its own, the file's, or a plain one) and a padding token."""
    with loading(f"tokenizer of {name!r}", name) as local_only:
        tokenizer = AutoTokenizer.from_pretrained(
            **_source(name, revision), trust_remote_code=trust_remote_code, local_files_only=local_only
        )
    if chat_template is not None:
        tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    if tokenizer.eos_token is None:
        raise ModelError(f"tokenizer of {name!r} has no end-of-text token: an answer could never end")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        with suppress(jinja2.TemplateError, TypeError):  # reported when a conversation is rendered
            rendered(tokenizer, [{"role": "user", "content": "a"}])
    except TemplateTimeout as error:
        raise ModelError(f"the chat template of {name!r} can't be used: {error}") from None
    return tokenizer


def context_length(model: Any) -> int | None:
    """Tokens that a prompt and its answer may have together; None where the config names no end."""
    return context_of(model.config)


def context_of(config: Any) -> int | None:
    """The same, by the config alone."""
    config = config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def keep_layout(model: torch.nn.Module) -> None:
    """Keep 4-bit layers on a CPU as they were loaded, and so trainable through.

    On CPUs with AVX-512 BF16, bitsandbytes (0.50) lays a layer's weights out anew for inference, scales rounded to
    bfloat16, in its first forward in evaluation mode that needs no gradient. From then on the layer's outputs carry no
    graph, in training mode too: training goes on, and learns nothing through that layer.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def compute_in(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Let a model with 4-bit layers compute in `dtype`, and keep in it what isn't quantized, but for weights that are
    kept in float32. A folder of 4-bit weights has its own, bfloat16 mostly, which transformers takes instead, and which
    older GPUs and most CPUs only emulate. Raises ModelError where a layer lacks its scales.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    layers: dict[str, Any] = {name: one for name, one in model.named_modules() if isinstance(one, Linear4bit)}
    for name, layer in layers.items():
        if getattr(layer.weight, "quant_state", None) is None:
            raise ModelError(
                f"{type(model).__name__}: the files hold 4-bit weights of {name}, but not their scales "
                f"({name}.weight.absmax and more): download or save the folder again"
            )
        layer.compute_dtype = layer.weight.quant_state.dtype = dtype
    for tensor in (*model.parameters(), *model.buffers()) if layers else ():
        if tensor.dtype in (torch.float16, torch.bfloat16) and not isinstance(tensor, Params4bit):
            tensor.data = tensor.data.to(dtype)


def quantization(llm: LanguageModel, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """transformers' settings of the LLM's quantization; `dtype` is that of the computation."""
    if llm.quantize == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=llm.double_quantize,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if llm.quantize == "int8" else None


def dequantized(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """An LLM in nf4 with the weights that it stands for in `dtype`, frozen. Raises ModelError where they take more
    memory than is free.
    """
    from bitsandbytes.nn import Linear4bit

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    needed = dtype.itemsize * sum(layer.in_features * layer.out_features for layer in layers)
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > ROOM * free:
        raise ModelError(
            f"train.dequantize_once: the LLM's weights take {needed / GIB:.1f} GiB in "
            f"{str(dtype).removeprefix('torch.')}, and may take {ROOM:.0%} of the {free / GIB:.1f} GiB that are free: "
            "leave it out, or take a smaller LLM"
        )
    whole: Any = model.dequantize(dtype=dtype)
    result: PreTrainedModel = whole.eval().requires_grad_(False)
    return result


def _load_gguf(llm: LanguageModel, options: dict[str, Any]) -> PreTrainedModel:
    path = Path(llm.name)
    plain = {**options, "device_map": {"": "cpu"} if llm.quantize != "none" else options["device_map"]}
    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), **plain
    )
    if llm.quantize == "none":
        return model
    # bitsandbytes quantizes while it loads, from safetensors: go through a folder of them.
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        saved = llm.model_copy(update={"name": folder, "revision": None})
        return load_language_model(saved, options["dtype"], options["device_map"][""])


@contextmanager
def without_adapter(language_model: Any) -> Iterator[None]:
    """The LLM as it came. What trains stays as it was: PEFT's own switch, turned back, makes all of LoRA trainable."""
    if not hasattr(language_model, "peft_config"):
        yield
        return
    before = [(parameter, parameter.requires_grad) for parameter in language_model.parameters()]
    with language_model.disable_adapter():
        yield
    for parameter, trained in before:
        parameter.requires_grad_(trained)


def decoder_layers(causal_lm: Any, decoder: Any = None) -> nn.ModuleList:
    """The LLM's layers: the outermost list of as many modules as its config has layers. `decoder`: where they are, if
    the model has other layers too. Raises ModelError.
    """
    count = causal_lm.config.get_text_config().num_hidden_layers
    for module in (causal_lm.base_model if decoder is None else decoder).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(f"{type(causal_lm).__name__} has no list of {count} decoder layers")
