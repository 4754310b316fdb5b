"""What transformers itself makes of a family's folder: the reference that others are compared with."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

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
        return _without_videos(PROCESSOR_MAPPING[type(config)]).from_pretrained(folder)


def _without_videos(processor_class: Any) -> Any:
    def get_attributes(cls: Any) -> list[str]:
        return [name for name in processor_class.get_attributes() if name != "video_processor"]

    return type(processor_class.__name__, (processor_class,), {"get_attributes": classmethod(get_attributes)})


def native_inputs(processor: Any, conversation: Conversation, **options: Any) -> Any:
    """All that the model's forward takes for this conversation: a batch of one."""
    return processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt", **options)
