"""Run as a script, in a process of its own: `ask.py FOLDER QUESTIONS ANSWERS [MODULE]`; the middle two are JSON files.

Answers greedily with the model in FOLDER, through transformers' Auto classes, or through peft over its base if the
questions have a `base`. Imports nothing of this package but MODULE.
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NotRequired, TypedDict

Chat = list[dict[str, Any]]  # messages in the form of transformers' processors


class BaseModelSpec(TypedDict):
    """How the LLM was loaded when its adapter was trained, and the options that its chat template is rendered with."""

    template_options: dict[str, bool]
    dtype: str
    quantize: str
    double_quantize: bool
    device: str


class QuestionFile(TypedDict):
    """Media of `chats` are paths: PNG files, WAV files at 16 kHz, or videos."""

    chats: list[Chat]
    max_new_tokens: int
    base: NotRequired[BaseModelSpec]


def main(folder: str, questions_file: str, answers_file: str, *modules: str) -> None:
    for module in modules:
        importlib.import_module(module)
    questions: QuestionFile = json.loads(Path(questions_file).read_text(encoding="utf-8"))
    base = questions.get("base")
    engine, model, inputs_of = with_transformers(folder) if base is None else with_peft(folder, base)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    answers = []
    for chat in questions["chats"]:
        inputs = inputs_of(chat)
        tokens = model.generate(
            **inputs, do_sample=False, repetition_penalty=1.0, max_new_tokens=questions["max_new_tokens"]
        )[0, inputs["input_ids"].shape[1] :].tolist()
        answers.append(next((tokens[:place] for place, token in enumerate(tokens) if token in ends), tokens))
    Path(answers_file).write_text(json.dumps({"engine": engine, "answers": answers}), encoding="utf-8")
    foreign = [name for name in sys.modules if name.split(".")[0] == "finetune"]
    if foreign and not modules:
        sys.exit(f"{foreign[0]} was imported, which the export must not need")


def with_transformers(folder: str) -> tuple[str, Any, Callable[[Chat], Any]]:
    """(engine and version, model, function from a conversation to the model's inputs)."""
    import PIL.Image
    import soundfile
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = transformers.AutoProcessor.from_pretrained(folder)
    (architecture,) = transformers.AutoConfig.from_pretrained(folder).architectures
    # By name where it is one of transformers': some belong to none of the Auto classes.
    model_class: Any = getattr(transformers, architecture, transformers.AutoModelForMultimodalLM)
    model = model_class.from_pretrained(folder, dtype="auto")
    model = model.to(device).eval()

    def inputs_of(chat: Chat) -> Any:
        for part in (part for message in chat for part in message["content"]):
            if part["type"] == "image":
                part["image"] = PIL.Image.open(part["image"]).convert("RGB")
            elif part["type"] == "audio":
                part["audio"], _ = soundfile.read(part["audio"], dtype="float32")
        inputs = processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        return inputs.to(device, dtype=model.dtype)

    return f"transformers {transformers.__version__}", model, inputs_of


def with_peft(folder: str, base: BaseModelSpec) -> tuple[str, Any, Callable[[Chat], Any]]:
    """As `with_transformers`; messages have text only."""
    import peft
    import torch
    import transformers

    dtype = getattr(torch, base["dtype"])
    quantizations = {
        "nf4": transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=base["double_quantize"],
            bnb_4bit_compute_dtype=dtype,
        ),
        "int8": transformers.BitsAndBytesConfig(load_in_8bit=True),
    }
    config = peft.PeftConfig.from_pretrained(folder)
    language_model = transformers.AutoModelForCausalLM.from_pretrained(
        config.base_model_name_or_path,
        revision=config.revision,
        dtype=dtype,
        quantization_config=quantizations.get(base["quantize"]),
        device_map={"": base["device"]},
    )
    model: Any = peft.PeftModel.from_pretrained(language_model, folder).eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model.generation_config = transformers.GenerationConfig.from_pretrained(folder, pad_token_id=tokenizer.pad_token_id)

    def inputs_of(chat: Chat) -> Any:
        inputs = tokenizer.apply_chat_template(
            chat, return_dict=True, return_tensors="pt", add_generation_prompt=True, **base["template_options"]
        )
        return {name: inputs[name].to(base["device"]) for name in ("input_ids", "attention_mask")}

    return f"peft {peft.__version__}", model, inputs_of


if __name__ == "__main__":
    main(*sys.argv[1:])
