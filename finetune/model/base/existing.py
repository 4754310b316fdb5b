"""A base: its config and processor, and its weights, loaded on first use."""

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoProcessor, BitsAndBytesConfig, GenerationMixin, PreTrainedModel, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.processing_utils import MODALITY_TO_AUTOPROCESSOR_MAPPING
from transformers.utils import cached_file
from transformers.video_processing_utils import BaseVideoProcessor

from finetune.common.errors import ModelError
from finetune.common.hub import NO_PROCESSOR, loading
from finetune.data.sample import Layout
from finetune.model.base.both_ways import reads_prompts_both_ways
from finetune.model.base.config import SECTIONS, media_in_config
from finetune.model.bounds import refuse_oversized
from finetune.model.composition import Rope
from finetune.model.language_model import PLAIN_TEMPLATE, compute_in, keep_layout, quantization
from finetune.model.template_limit import rendered
from finetune.model.tokenize import WORD, Placeholder, text_content
from finetune.recipe.schema import Base, Quantize

# What saving a processor leaves out: settings of parts that can't be read here, and the SentencePiece model, from which
# llama.cpp's converter takes a tokenizer.
ALSO_PUBLISHED = ("preprocessor_config.json", "video_preprocessor_config.json", "tokenizer.model")
# At the end of a conversation, for templates that end answers without a token that could be learned.
END = "{% if messages and messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
# Of a base that reads prompts both ways, where it has none: what PaliGemma's processor writes, media, question, a line
# break and the answer.
PROMPT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] if part['type'] != 'text' %}"
    "{{ tokens[part['type']] }}{% endfor %}{% endfor %}{{ bos_token or '' }}{% for message in messages %}"
    "{% set said %}{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endset %}{% if message['role'] == 'assistant' %}{{ said | trim }}{% else %}{{ said + '\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token if loop.last else '\n' }}{% endif %}{% endfor %}"
)
PLAIN_PARTS = PLAIN_TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else tokens[part['type']] }}"
    "{% endfor %}",
)


@dataclass
class ExistingModel:
    """`media`: the kinds that it takes. `dtype`: of the weights that aren't quantized, and of the computation."""

    settings: Base
    config: Any
    processor: Any
    media: tuple[str, ...]
    model_class: Any
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def load(cls, settings: Base, dtype: torch.dtype, device: torch.device) -> "ExistingModel":
        """Read its config and processor, no weights. Raises ModelError where it isn't a model that takes media, or
        can't be loaded without running code of its repository.
        """
        what = f"base {settings.name!r}"
        with loading(what, settings.name) as local_only:
            options: dict[str, Any] = {"revision": settings.revision, "local_files_only": local_only}
            config = AutoConfig.from_pretrained(settings.name, trust_remote_code=False, **options)
            if (model_class := _class_of(config)) is None:
                raise ModelError(
                    f"{what} is a {config.model_type!r}, which transformers loads as no model that takes media: write "
                    "it as model.llm if it is a text-only LLM"
                )
            refuse_oversized(config.to_dict(), what)
            processor = _processor(settings.name, config, options)
        media = tuple(kind for kind in media_in_config(config.to_dict()) if kind != "video" or _reads_videos(processor))
        if not media:
            raise ModelError(f"{what} is a {config.model_type!r} that takes no media: write it as model.llm")
        _complete_template(processor, settings, media, reads_prompts_both_ways(config))
        existing = cls(settings, config, processor, media, model_class, dtype, device)
        skeleton = existing.skeleton
        if skeleton.get_decoder() is skeleton.base_model and not media_modules(skeleton.base_model):
            raise ModelError(
                f"{what}: in a {model_class.__name__} neither accessors nor modules tell its language model from its "
                "encoders: it can't be trained here"
            )
        return existing

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @cached_property
    def skeleton(self) -> Any:
        """The model on the meta device: names and shapes."""
        with torch.device("meta"), no_init_weights():
            return self.model_class._from_config(copy.deepcopy(self.config), dtype=self.dtype)

    @cached_property
    def model(self) -> Any:
        """The weights, frozen, in evaluation mode; the decoder's quantized as the settings say. Raises ModelError."""
        if self.device.type == "meta":
            return self.skeleton.eval().requires_grad_(False)
        settings = self.settings
        options: dict[str, Any] = {"device_map": {"": self.device}, "dtype": self.dtype, "use_safetensors": True}
        if settings.attention != "auto":
            options["attn_implementation"] = settings.attention
        with loading(f"base {settings.name!r}", settings.name) as local_only:
            model, report = self.model_class.from_pretrained(
                settings.name,
                revision=settings.revision,
                quantization_config=self.quantization(),
                local_files_only=local_only,
                adapter_kwargs={"local_files_only": local_only},
                output_loading_info=True,
                **options,
            )
        if wrong := [*report["missing_keys"], *report["mismatched_keys"]]:  # transformers would draw them at random
            raise ModelError(
                f"base {settings.name!r}: {len(wrong)} weights of {type(model).__name__} aren't in its files, or have "
                f"another shape: {sorted(map(str, wrong))[0]}"
            )
        compute_in(model, self.dtype)
        keep_layout(model)
        return model.eval().requires_grad_(False)

    def reloaded(self, quantize: Quantize, device: torch.device) -> "ExistingModel":
        """A copy to be loaded again, with another quantization."""
        return replace(self, settings=self.settings.model_copy(update={"quantize": quantize}), device=device)

    def release_weights(self) -> None:
        """Drop the loaded weights, to free their memory."""
        self.__dict__.pop("model", None)

    def save_processor(self, folder: Path) -> None:
        """Write the processor as it was published, with the files of it that can't be read here."""
        own, completed = getattr(self.processor, "chat_template", None), self.tokenizer.chat_template
        self.tokenizer.chat_template = own or completed
        self.processor.save_pretrained(folder)
        self.tokenizer.chat_template = completed
        for name in ALSO_PUBLISHED:
            found = cached_file(
                self.settings.name,
                name,
                revision=self.settings.revision,
                local_files_only=True,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            if found is not None and not (folder / name).exists():
                shutil.copyfile(found, folder / name)

    def quantization(self) -> BitsAndBytesConfig | None:
        """transformers' settings, which leave all modules alone that aren't the decoder's."""
        config = quantization(self.settings, self.dtype)
        if config is not None:
            config.llm_int8_skip_modules = beside_language(self.skeleton)
        return config

    @property
    def prompts_both_ways(self) -> bool:
        """See `Placement.prompts_both_ways`."""
        return reads_prompts_both_ways(self.config)

    @property
    def rope(self) -> Rope | None:
        """See `Placement.rope`."""
        return self.positions if hasattr(self.skeleton.base_model, "get_rope_index") else None

    def positions(self, input_ids: Sequence[int], media: Sequence[tuple[str, Layout]]) -> list[list[int]]:
        """The positions (3, T) of one sample, by the model's own `get_rope_index`."""
        ids = torch.tensor([list(input_ids)])
        kinds = torch.zeros_like(ids)
        given: dict[str, Any] = {"mm_token_type_ids": kinds, "attention_mask": torch.ones_like(ids)}
        if lengths := [layout.grid for kind, layout in media if kind == "audio" and layout.grid]:
            given["audio_seqlens"] = torch.tensor(lengths)[:, 0]
        for number, kind in enumerate(("image", "video"), 1):
            if kind in self.media:
                kinds[ids == self.token_id(kind)] = number
            if layouts := [layout for other, layout in media if other == kind]:
                given[f"{kind}_grid_thw"] = torch.tensor([layout.grid for layout in layouts])
                if layouts[0].grid_seconds is not None:
                    seconds = torch.tensor([layout.grid_seconds for layout in layouts])
                    given |= {"second_per_grid_ts": seconds, "second_per_grids": seconds}
        rule = self.skeleton.base_model.get_rope_index
        taken = signature(rule).parameters
        found, _ = rule(input_ids=ids, **{name: value for name, value in given.items() if name in taken})
        result: list[list[int]] = found[:, 0].tolist()
        return result

    def token_id(self, kind: str) -> int:
        """The id of the placeholder token that stands for a row of features."""
        sections = [getattr(self.config, name, None) for name in ("thinker_config", *SECTIONS.get(kind, ()))]
        for key in (f"{kind}_token_id", f"{kind}_token_index"):
            for config in (self.config, *sections):
                if isinstance(number := getattr(config, key, None), int):
                    return number
        raise ModelError(f"base {self.settings.name!r}: its config names no token for {kind}")

    def placeholders(self) -> dict[str, Placeholder]:
        """{medium: the token that its chat template writes, and the id of those that stand for features}"""
        found = {}
        for kind in self.media:
            number = self.token_id(kind)
            token = getattr(self.processor, f"{kind}_token", None) or self.tokenizer.convert_ids_to_tokens(number)
            found[kind] = Placeholder(token, number, native=True)
        return found


def beside_language(model: Any) -> list[str]:
    """Names of the outermost modules of a base that aren't of its language model: its output head, and all that media
    pass through, also where the decoder holds it.
    """
    return modules_beside(model, model.get_decoder())


def language_modules(model: Any) -> list[nn.Module]:
    """The modules of a base's decoder, without those that media pass through."""
    decoder = model.get_decoder()
    media = {id(module) for name in media_modules(decoder) for module in decoder.get_submodule(name).modules()}
    return [module for module in decoder.modules() if id(module) not in media]


def media_modules(decoder: nn.Module) -> list[str]:
    """Names of the modules inside a decoder that hold other models: its encoders, as in Phi-4-multimodal."""
    return [
        name
        for name, child in decoder.named_children()
        if any(isinstance(module, PreTrainedModel) for module in child.modules())
    ]


def modules_beside(whole: nn.Module, decoder: nn.Module, name: str = "") -> list[str]:
    """Names of the outermost modules of `whole` that don't hold the decoder, and of the encoders inside it."""
    if whole is decoder:
        return [f"{name}.{key}".lstrip(".") for key in media_modules(decoder)]
    if not any(module is decoder for module in whole.modules()):
        return [name]
    inner = (modules_beside(child, decoder, f"{name}.{key}".lstrip(".")) for key, child in whole.named_children())
    return [beside for names in inner for beside in names]


def _class_of(config: Any) -> Any:
    """The class of transformers for a model that takes media; None where there is none."""
    if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]
    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    takes_media = isinstance(named, type) and issubclass(named, GenerationMixin) and media_in_config(config.to_dict())
    return named if takes_media else None


def _processor(name: str, config: Any, options: Mapping[str, Any]) -> Any:
    """Of all media that can be read here: transformers reads videos with torchvision only."""
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False, **options)
    except ImportError as error:
        processor = _without_videos(name, config, options, error)
    if getattr(processor, "tokenizer", None) is None:
        raise ModelError(f"base {name!r} can't be loaded: {NO_PROCESSOR} (there is only a {type(processor).__name__})")
    return processor


def _without_videos(name: str, config: Any, options: Mapping[str, Any], error: ImportError) -> Any:
    settings, _ = ProcessorMixin.get_processor_dict(name, **options)
    pictures, _ = BaseImageProcessor.get_image_processor_dict(name, **options)
    found: Any = getattr(transformers, str(settings.get("processor_class", pictures.get("processor_class"))), None)
    found = found or PROCESSOR_MAPPING.get(type(config), None)
    if found is None or "video_processor" not in found.get_attributes():
        raise ModelError(
            f"base {name!r}: its processor can't be loaded: {' '.join(str(error).split())[:200]}"
        ) from None

    given: dict[str, Any] = {}
    for part in found.get_attributes():
        if part == "video_processor":
            given[part] = _UnreadVideos(_UnreadVideos.get_video_processor_dict(name, **options)[0])
        else:
            given[part] = MODALITY_TO_AUTOPROCESSOR_MAPPING[part].from_pretrained(name, **options)
    without: Any = type(found.__name__, (_WithoutVideos, found), {})
    return without.from_args_and_dict(list(given.values()), settings)


class _WithoutVideos:
    """Goes before a processor's class, whose check asks for torchvision too."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if isinstance(argument, _UnreadVideos):
            return type(argument)
        return super().check_argument_for_proper_class(argument_name, argument)  # type: ignore[misc]


class _UnreadVideos(BaseVideoProcessor):  # type: ignore[no-untyped-call]
    """Stands in the place of a base's video processor, which can't be built without torchvision: keeps its settings, to
    be saved with the others.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def to_dict(self) -> dict[str, Any]:
        return self.settings


def _reads_videos(processor: Any) -> bool:
    return not isinstance(getattr(processor, "video_processor", None), _UnreadVideos | None)


def _complete_template(processor: Any, settings: Base, media: tuple[str, ...], both_ways: bool) -> None:
    """Give the tokenizer the processor's chat template, with the tokens at both ends that training needs."""
    tokenizer = processor.tokenizer
    if tokenizer.eos_token is None:
        raise ModelError(f"tokenizer of {settings.name!r} has no end-of-text token: an answer could never end")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    if settings.chat_template is not None:
        template = settings.chat_template.read_text(encoding="utf-8")
        processor.chat_template = template
    if template is None:
        tokens = {kind: getattr(processor, f"{kind}_token", f"<{kind}>") for kind in media}
        plain = PROMPT_TEMPLATE if both_ways else PLAIN_PARTS
        template = f"{{% set tokens = {tokens!r} %}}" + plain
    tokenizer.chat_template = template
    question, whole = _rendered(tokenizer, 1, True), _rendered(tokenizer, 2, False)
    if not whole.startswith(question):  # answers are rendered otherwise than the generation prompt
        alone = len(_rendered(tokenizer, 1, False))
        written, generated = whole[alone : whole.rindex(WORD)], question[alone:]
        template = tokenizer.chat_template
        tokenizer.chat_template = f"{{% filter replace({written!r}, {generated!r}) %}}{template}{{% endfilter %}}"
        whole = _rendered(tokenizer, 2, False)
    if not whole.rpartition(WORD)[2].strip():  # nothing ends the answer
        tokenizer.chat_template += END
    first = tokenizer(question)["input_ids"][0]
    if first == tokenizer.bos_token_id and not question.startswith(tokenizer.bos_token):
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template


def _rendered(tokenizer: Any, turns: int, generation: bool) -> str:
    """The first turns of a conversation, each of WORD; `generation`: with the generation prompt. Raises ModelError."""
    conversation = [{"role": role, "content": text_content(tokenizer, WORD)} for role in ("user", "assistant")]
    try:
        return rendered(tokenizer, conversation[:turns], generation)
    except Exception as error:  # a template raises what its author chose, jinja2.TemplateError or anything else
        raise ModelError(
            f"base {tokenizer.name_or_path!r}: its chat template refuses a question and its answer: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
