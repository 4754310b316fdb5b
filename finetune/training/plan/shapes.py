"""The parts of a model from their configs, and their weights as shapes."""

import copy
import gc
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.initialization import no_init_weights
from transformers.quantizers.auto import AutoHfQuantizer

from finetune.common.hub import loading
from finetune.model.base.existing import ExistingModel
from finetune.model.language_model import keep_layout, quantization, read_config, ready
from finetune.recipe.schema import LanguageModel, Quantize

META = torch.device("meta")


def language_model_on_meta(llm: LanguageModel, dtype: torch.dtype) -> Any:
    """The LLM as `load_language_model` gives it, from its config alone. Raises ModelError."""
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": llm.trust_remote_code}
    if llm.attention == "eager":  # the other implementations keep what torch's own fused attention keeps
        options["attn_implementation"] = llm.attention
    config = read_config(llm)
    with loading(f"LLM {llm.name!r}", llm.name), META, no_init_weights():
        model = AutoModelForCausalLM.from_config(config, **options)
    _quantize(model, quantization(llm, dtype), dtype)
    return ready(model, llm)


def base_on_meta(base: ExistingModel, quantize: Quantize) -> Any:
    """The base as it is loaded with this quantization, from its config alone. Its encoders compute with it from here
    on, on the CPU, once its weights are there without data.
    """
    base.settings = base.settings.model_copy(update={"quantize": quantize})
    model = copy.deepcopy(base.skeleton)
    if base.settings.attention == "eager":
        model.set_attn_implementation("eager")
    _quantize(model, base.quantization(), base.dtype)
    keep_layout(model)
    base.model, base.device = model.eval().requires_grad_(False), torch.device("cpu")
    return base.model


def _quantize(model: Any, settings: BitsAndBytesConfig | None, dtype: torch.dtype) -> None:
    if settings is not None:
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
        quantizer.preprocess_model(model, dtype=dtype, device_map={"": META})
        quantizer.postprocess_model(model)


def without_data(module: nn.Module, dtype: torch.dtype) -> None:
    """Put tensors without data in the place of a module's weights on the meta device; in 4 or 8 bits where its layers
    are quantized, from weights of `dtype`.
    """
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    made: dict[int, nn.Parameter] = {}
    for layer in module.modules():
        for name, parameter in layer._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                if isinstance(parameter, Params4bit | Int8Params):
                    made[id(parameter)] = _quantized(parameter, dtype)
                else:
                    kept = dtype if isinstance(layer, Linear4bit | Linear8bitLt) else parameter.dtype
                    made[id(parameter)] = nn.Parameter(
                        torch.empty(parameter.shape, dtype=kept), requires_grad=parameter.requires_grad
                    )
            layer._parameters[name] = made[id(parameter)]
        for name, buffer in layer._buffers.items():
            if buffer is not None:
                layer._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
        if isinstance(layer, Linear8bitLt):
            layer.state.threshold = 0.0  # how many values are outliers can't be known
    gc.collect()


def _quantized(parameter: Any, dtype: torch.dtype) -> nn.Parameter:
    """A plain parameter with the attributes of bitsandbytes' own, which takes no tensors without data."""
    from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit
    from bitsandbytes.nn import Params4bit

    attributes = dict(parameter.__dict__)
    if isinstance(parameter, Params4bit):
        values, state = quantize_4bit(
            torch.empty(parameter.shape, dtype=dtype),
            blocksize=parameter.blocksize,
            compress_statistics=parameter.compress_statistics,
            quant_type=parameter.quant_type,
            quant_storage=parameter.quant_storage,
        )
        attributes |= {"quant_state": state, "bnb_quantized": True}
    else:
        values, scales, _ = int8_vectorwise_quant(torch.empty(parameter.shape, dtype=torch.float16))
        attributes |= {"CB": values, "SCB": scales}
    result = nn.Parameter(values, requires_grad=False)
    result.__dict__.update(attributes)
    return result
