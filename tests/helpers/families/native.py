"""What transformers itself makes of a family's folder: the reference that others are compared with."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
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
        config = transformers.AutoConfig.from_pretrained(folder)
        processor_class = _without_videos(PROCESSOR_MAPPING[type(config)])
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
    return processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt", **options)
