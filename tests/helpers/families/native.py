"""What transformers itself makes of a family's folder: the reference that others are compared with."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.processing_utils import MODALITY_TO_AUTOPROCESSOR_MAPPING

Conversation = list[dict[str, Any]]


def native_model(folder: Path) -> Any:
    """The class that the folder's config names, in float32, without dropout."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()


def native_processor(folder: Path) -> Any:
    """Video processors need torchvision: without it, the family's own processor for all media but videos."""
    try:
        return transformers.AutoProcessor.from_pretrained(folder)
    except ImportError:
        named = json.loads((folder / "preprocessor_config.json").read_text())["processor_class"]
        processor_class = _without_videos(getattr(transformers, named))
        settings, _ = processor_class.get_processor_dict(folder)
        parts = [
            None if name == "video_processor" else MODALITY_TO_AUTOPROCESSOR_MAPPING[name].from_pretrained(folder)
            for name in processor_class.get_attributes()
        ]
        return processor_class.from_args_and_dict(parts, settings)


def _without_videos(processor_class: Any) -> Any:
    def check_argument_for_proper_class(self: Any, name: str, value: Any) -> Any:
        return None if value is None else processor_class.check_argument_for_proper_class(self, name, value)

    # SmolVLM's own `apply_chat_template` asks the video processor for its frames, also where there is no video.
    methods = {
        "check_argument_for_proper_class": check_argument_for_proper_class,
        "apply_chat_template": transformers.ProcessorMixin.apply_chat_template,
    }
    return type(processor_class.__name__, (processor_class,), methods)


def native_inputs(processor: Any, conversation: Conversation, **options: Any) -> Any:
    """All that the model's forward takes for this conversation: a batch of one."""
    if isinstance(processor, transformers.PaliGemmaProcessor):  # a picture, a question, an answer: no chat template
        (picture, question), *answers = (message["content"] for message in conversation)
        text = processor.image_token + question["text"]
        suffix = {"suffix": answers[0][0]["text"]} if answers else {}
        inputs = processor(images=picture["image"], text=text, return_tensors="pt", **suffix)
        return {name: value for name, value in inputs.items() if name != "labels"}
    if isinstance(processor, transformers.VoxtralProcessor):
        return _voxtral_inputs(processor, conversation)
    if processor.chat_template is None:  # Phi-4-multimodal's processor leaves it with the tokenizer
        options = {"chat_template": processor.tokenizer.chat_template, **options}
    return processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt", **options)


def _voxtral_inputs(processor: Any, conversation: Conversation) -> Any:
    """The processor writes conversations by the package mistral-common, which can't be installed beside numpy 2.4. The
    format is that of its `InstructTokenizerV7`: 375 tokens for each half minute.
    """
    (recording, question), (answer,) = (message["content"] for message in conversation)
    settings = dict(processor.audio_kwargs)
    frames = settings.pop("max_source_positions")
    features = processor._retrieve_input_features([recording["audio"]], frames, **settings)
    sound = "[BEGIN_AUDIO]" + "[AUDIO]" * (375 * len(features))
    text = f"<s>[INST]{sound}{question['text']}[/INST]{answer['text']}</s>"
    tokens = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "input_features": features}
