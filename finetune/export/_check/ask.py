"""Run as a program, in a process of its own: `FOLDER QUESTIONS ANSWERS [MODULE]`, both JSON. Greedy answers of a folder
through transformers' Auto classes, or through peft over its base where the questions say so. Nothing of this package is
imported but MODULE, where it is named.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def main(folder: str, questions: str, answers: str, *modules: str) -> None:
    for module in modules:
        importlib.import_module(module)
    asked = json.loads(Path(questions).read_text(encoding="utf-8"))
    given = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": asked["max_new_tokens"]}
    told = []
    engine, model, inputs_of = with_peft(folder, asked["peft"]) if "peft" in asked else with_transformers(folder)
    ends = model.generation_config.eos_token_id
    for chat in asked["chats"]:
        inputs = inputs_of(chat)
        tokens = model.generate(**inputs, **given)[0, inputs["input_ids"].shape[1] :].tolist()
        known = ends if isinstance(ends, list) else [ends]
        told.append(next((tokens[:place] for place, token in enumerate(tokens) if token in known), tokens))
    Path(answers).write_text(json.dumps({"engine": engine, "answers": told}), encoding="utf-8")
    foreign = [name for name in sys.modules if name.split(".")[0] == "finetune"]
    if foreign and not modules:
        sys.exit(f"{foreign[0]} was imported, which what is exported must not need")


def with_transformers(folder: str) -> tuple[str, Any, Any]:
    """(engine, model, what makes inputs of a conversation). Some classes are among none of the Auto classes."""
    import numpy as np
    import PIL.Image
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = transformers.AutoProcessor.from_pretrained(folder)
    (architecture,) = transformers.AutoConfig.from_pretrained(folder).architectures
    model_class: Any = getattr(transformers, architecture, transformers.AutoModelForMultimodalLM)
    model = model_class.from_pretrained(folder, dtype="auto")
    model = model.to(device).eval()

    def inputs_of(chat: list[dict[str, Any]]) -> Any:
        for part in (part for message in chat for part in message["content"]):
            if part["type"] == "image":
                part["image"] = PIL.Image.open(part["image"]).convert("RGB")
            elif part["type"] == "audio":
                part["audio"] = np.load(part["audio"])
        inputs = processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        return inputs.to(device, dtype=model.dtype)

    return f"transformers {transformers.__version__}", model, inputs_of


def with_peft(folder: str, base: dict[str, Any]) -> tuple[str, Any, Any]:
    """The same. `base`: the dtype, quantization and device that the adapter was trained over."""
    import peft
    import torch
    import transformers

    quantizations: dict[str, dict[str, Any]] = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "int8": {"load_in_8bit": True},
    }
    quantization = quantizations.get(base["quantize"], {})
    if base["quantize"] == "nf4":
        quantization |= {
            "bnb_4bit_use_double_quant": base["double_quantize"],
            "bnb_4bit_compute_dtype": base["dtype"],
        }
    config = peft.PeftConfig.from_pretrained(folder)
    language_model = transformers.AutoModelForCausalLM.from_pretrained(
        config.base_model_name_or_path,
        revision=config.revision,
        dtype=getattr(torch, base["dtype"]),
        quantization_config=transformers.BitsAndBytesConfig(**quantization) if quantization else None,
        device_map={"": base["device"]},
    )
    model: Any = peft.PeftModel.from_pretrained(language_model, folder).eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model.generation_config = transformers.GenerationConfig.from_pretrained(folder, pad_token_id=tokenizer.pad_token_id)

    def inputs_of(chat: list[dict[str, Any]]) -> Any:
        inputs = tokenizer.apply_chat_template(
            chat, return_dict=True, return_tensors="pt", add_generation_prompt=True, **base["template"]
        )
        return {name: inputs[name].to(base["device"]) for name in ("input_ids", "attention_mask")}

    return f"peft {peft.__version__}", model, inputs_of


if __name__ == "__main__":
    main(*sys.argv[1:])
