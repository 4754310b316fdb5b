"""A composite as one of transformers' own classes, if one holds it exactly: LLaVA for pictures, Qwen2-Audio and Audio
Flamingo 3 for sound. Exactness is measured: on the LLM's head, on the encoder, and on the folder as it is read back.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from finetune.common.errors import ArtifactError, DataError, ExportRefused
from finetune.data.media import noise
from finetune.data.sample import Medium, Message, media_in
from finetune.export._check.probes import as_chat, prompt_batch
from finetune.export._language_model import NAME, language_model_state, media_tokenizer, text_config
from finetune.model.assistant import Assistant
from finetune.model.composite import MultimodalModel
from finetune.model.load import load_exactly
from finetune.model.prompts import logits as logits_of

# Of the logits, as a share of their norm. In half precision the projector, which ours keeps in float32, is rounded too.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PROJECTOR_LAYERS = {"mlp": {"0": "linear_1", "2": "linear_2"}, "linear": {"": "linear"}}
AUDIO_CLASSES = {"linear": "Qwen2AudioForConditionalGeneration", "mlp": "AudioFlamingo3ForConditionalGeneration"}


class NotExact(ExportRefused):
    """No class of transformers holds this model exactly; the message is the reason, as half a sentence."""


@dataclass(frozen=True)
class NativeClass:
    """`name`: in transformers. `medium`: 'image' or 'audio'. `last_is_normed`: features are read after the encoder's
    last norm, which the class applies only if its config says so.
    """

    name: str
    medium: str
    last_is_normed: bool = False


def write_native(assistant: Assistant, folder: Path, refused: Mapping[str, str] = {}) -> NativeClass:
    """Write the model as the class that holds it, read it back, and compare it with the composite.

    `refused`: {class: reason} of classes that the target can't run. Raises NotExact, with `folder` left empty, if no
    class holds the model. Needs memory for the model twice.
    """
    native = native_class(assistant.model)
    if native.name in refused:
        raise NotExact(f"{native.name} {refused[native.name]}")
    try:
        write_files(assistant, folder, native)
        compare_files(assistant, folder, native)
    except NotExact:
        for path in folder.iterdir():
            path.unlink()
        raise
    return native


def native_class(composite: MultimodalModel) -> NativeClass:
    """The class that holds this model as far as its parts tell. Raises NotExact."""
    composition = composite.composition
    if len(composition.encoders) != 1:
        names = ", ".join(composition.encoders)
        raise NotExact(f"it has {len(composition.encoders)} encoders ({names}), and no class takes them all")
    if composition.fusion.kind != "prefix":
        raise NotExact(f"its fusion is {composition.fusion.kind!r}, which no other class has")
    if composite.heads:
        raise NotExact(
            f"it has a head with weights ({', '.join(composite.heads)}), which other classes would leave out"
        )
    (name,) = composition.encoders
    kind = composition.encoders[name].kind
    encoder: Any = composite.encoder_parts[name]  # its own kind's class: which one the checks below tell
    projector = composition.projectors[name].part.kind
    hidden = getattr(composition.projectors[name].part.options, "hidden", None)
    if projector == "mlp" and hidden not in (None, composite.config.text_config.hidden_size):
        raise NotExact(f"its projector's hidden layer is {hidden} wide, not as wide as the LLM")
    _require_plain_head(composite.causal_lm)
    if kind == "vision" and projector == "mlp":
        return _llava(encoder)
    if kind == "whisper" and projector in AUDIO_CLASSES:
        options = encoder.options
        if options.pool != 2 or options.layer != -1:
            raise NotExact("its Whisper isn't read as in those classes (`pool: 2`, `layer: -1`)")
        if options.window_seconds != 30:
            raise NotExact(f"its Whisper encodes windows of {options.window_seconds:g} seconds, those classes of 30")
        return NativeClass(AUDIO_CLASSES[projector], name)
    raise NotExact(f"no class has the encoder {kind!r} with the projector {projector!r}")


@torch.no_grad()
def _require_plain_head(causal_lm: Any) -> None:
    """Raises NotExact unless the LLM's logits are its last states times its head's weights: other classes compute no
    more than that.
    """
    family = causal_lm.config.get_text_config().model_type
    head, table = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    if getattr(causal_lm.config.get_text_config(), "final_logit_softcapping", None):
        raise NotExact(f"{family} caps its logits, which other classes would leave out")
    embeddings = table(torch.arange(3, 35, device=table.weight.device)[None] % len(table.weight))
    mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
    logits = causal_lm(inputs_embeds=embeddings, attention_mask=mask).logits.float()
    states = causal_lm.base_model(inputs_embeds=embeddings, attention_mask=mask)[0]
    if states.shape[-1] != head.weight.shape[-1] or _distance(functional.linear(states, head.weight), logits) > 1e-3:
        raise NotExact(f"{family} scales its logits, or adds a bias to them, which other classes would leave out")


def _llava(encoder: Any) -> NativeClass:
    """Raises NotExact unless LLaVA reads the same features from the backbone as this encoder."""
    shape, module, layer = encoder.shape, encoder.module, encoder.options.layer
    kind = module.config.model_type
    if encoder.options.tiles > 1:
        raise NotExact("it cuts pictures into tiles, which LLaVA doesn't")
    if shape.skipped > 1:
        raise NotExact(
            f"{kind} has {shape.skipped} class and register tokens; LLaVA drops one or none (see `tokens: all`)"
        )
    values = encoder.prepare(noise("image")).values.to(module.device, module.dtype)
    features, last = _states_of_llava(module, values, layer)
    patch = getattr(module.config, "patch_size", None)
    if features.ndim != 3 or not isinstance(patch, int):
        raise NotExact(f"{kind} doesn't give rows of patches, which LLaVA takes")
    if shape.rows < _patches(encoder) or features.shape[1] != shape.rows + shape.skipped:
        raise NotExact(f"{kind} gives {shape.rows} rows, not one per patch, as LLaVA counts them")
    normed = layer == -1 and _distance(features, last) > 1e-6
    if normed and _distance(_states_of_llava(module, values, -1, tie=True)[0], last) > 1e-6:
        raise NotExact(f"LLaVA reads {kind} before its last norm, this model after it (not so with `layer: -2`)")
    return NativeClass("LlavaForConditionalGeneration", "image", last_is_normed=normed)


def _patches(encoder: Any) -> int:
    patch = encoder.module.config.patch_size
    patches: int = (encoder.shape.height // patch) * (encoder.shape.width // patch)
    return patches


@torch.no_grad()
def _states_of_llava(module: Any, pixels: Tensor, layer: int, tie: bool = False) -> tuple[Tensor, Tensor]:
    """The hidden state that LLaVA reads (empty if the backbone gives none), and the last one. `tie`: transformers'
    setting that makes the last one, after the norm, one of the hidden states.
    """
    settings = vars(module.config)
    before = dict(settings)
    settings.update({"tie_last_hidden_states": True} if tie else {})
    states = module(pixel_values=pixels, output_hidden_states=True)
    settings.clear()
    settings.update(before)
    return (states.hidden_states or [torch.empty(0)])[layer], states.last_hidden_state


def write_files(assistant: Assistant, folder: Path, native: NativeClass) -> None:
    """Write weights, config, processor, chat template and generation config. Raises NotExact if the class can't be
    built around this LLM.
    """
    composite = assistant.model
    state = _state(assistant, native)
    config = _config(assistant, native, state)
    try:
        with torch.device("meta"):
            model = getattr(transformers, native.name)(config)
        model.load_state_dict(state, assign=True)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        family = composite.config.text_config.model_type
        reason = " ".join(str(error).split())[:200]
        raise NotExact(f"{native.name} can't be built around {family} ({reason})") from None
    model.config.dtype = composite.causal_lm.dtype
    model.generation_config = copy.deepcopy(composite.language_model.generation_config)
    model.save_pretrained(folder)
    _processor(assistant, native, config).save_pretrained(folder)


def _state(assistant: Assistant, native: NativeClass) -> dict[str, Tensor]:
    """Weights by the names of the class, in the dtype of the LLM."""
    composite = assistant.model
    state, _ = language_model_state(composite.causal_lm, len(assistant.tokenizer))
    state.pop("lm_head.bias", None)  # 0, or `native_class` would have refused it
    tower = "vision_tower" if native.medium == "image" else "audio_tower"
    state |= {f"model.{tower}.{name}": t.detach() for name, t in composite.encoders[native.medium].state_dict().items()}
    layers = PROJECTOR_LAYERS[composite.composition.projectors[native.medium].part.kind]
    for name, tensor in composite.projectors[native.medium].state_dict().items():
        layer, _, kind = name.rpartition(".")
        state[f"model.multi_modal_projector.{layers[layer]}.{kind}"] = tensor.detach()
    dtype = composite.causal_lm.dtype
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _config(assistant: Assistant, native: NativeClass, state: dict[str, Tensor]) -> Any:
    """The config of the class. If it doesn't tie the head to the embedding table, they become two tensors in `state`:
    shared weights would be written once, and the head would be missing.
    """
    composite = assistant.model
    text, head = text_config(assistant), state["lm_head.weight"]
    # Only LLaVA's class can tie the two, and only under this name.
    table = state.get(f"{NAME}.embed_tokens.weight") if native.medium == "image" else None
    text.tie_word_embeddings = table is not None and table.data_ptr() == head.data_ptr()
    if not text.tie_word_embeddings:
        state["lm_head.weight"] = head.clone()
    encoder = composite.encoder_parts[native.medium]
    config_class = getattr(transformers, native.name).config_class
    medium_config = (
        _vision_config(encoder, native) if native.medium == "image" else _audio_config(encoder, config_class)
    )
    config = config_class(text_config=text, **medium_config, tie_word_embeddings=text.tie_word_embeddings)
    setattr(config, f"{native.medium}_token_id", assistant.placeholders[native.medium].id)
    generation = composite.language_model.generation_config
    config.eos_token_id, config.bos_token_id = generation.eos_token_id, generation.bos_token_id
    config.pad_token_id = assistant.tokenizer.pad_token_id
    return config


def _vision_config(encoder: Any, native: NativeClass) -> dict[str, object]:
    config = copy.deepcopy(encoder.module.config)
    config.name_or_path = ""
    if native.last_is_normed:
        config.tie_last_hidden_states = True
    return {
        "vision_config": config,
        "vision_feature_layer": encoder.options.layer,
        "vision_feature_select_strategy": "default" if encoder.shape.skipped else "full",
        "image_seq_length": encoder.shape.rows,
    }


def _audio_config(encoder: Any, config_class: Any) -> dict[str, object]:
    names = (
        *("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim"),
        *("num_mel_bins", "max_source_positions", "activation_function"),
    )
    model_type = config_class.sub_configs_defaults["audio_config"].model_type
    values = {name: getattr(encoder.module.config, name) for name in names}
    return {"audio_config": transformers.AutoConfig.for_model(model_type, **values)}


def _processor(assistant: Assistant, native: NativeClass, config: Any) -> Any:
    """The class's processor, with a chat template that puts media where the composite has them."""
    encoder: Any = assistant.encoders[native.medium]
    token = assistant.placeholders[native.medium].token
    tokenizer = media_tokenizer(assistant)
    text = {"tokenizer": tokenizer, "chat_template": tokenizer.chat_template}
    if native.medium == "image":
        images = copy.deepcopy(encoder.processor)
        # Pixels don't depend on it if nothing is cropped; vLLM reads the size from it to count tokens.
        if not getattr(images, "crop_size", None):
            images.crop_size = {"height": encoder.shape.height, "width": encoder.shape.width}
        images.do_convert_rgb = True
        return transformers.LlavaProcessor(
            images,
            patch_size=encoder.module.config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=encoder.shape.rows + encoder.shape.skipped - _patches(encoder),
            image_token=token,
            **text,
        )
    sounds = type(encoder.processor).from_dict(encoder.processor.to_dict() | {"return_attention_mask": True})
    if native.name.startswith("Qwen2Audio"):
        # Nothing marks the beginning and end of sound: both are the placeholder, and the template writes neither.
        marks = {"audio_bos_token": token, "audio_eos_token": token}
        return transformers.Qwen2AudioProcessor(sounds, audio_token=token, **marks, **text)
    return transformers.AudioFlamingo3Processor(sounds, audio_token=token, **text)


@torch.no_grad()
def compare_files(assistant: Assistant, folder: Path, native: NativeClass) -> None:
    """Raises NotExact unless the folder gives the composite's token ids and logits for conversations about noise."""
    composite = assistant.model
    device = composite.get_input_embeddings().weight.device
    try:
        model = load_exactly(getattr(transformers, native.name), folder).to(device).eval()
    except ArtifactError as error:
        raise NotExact(f"{native.name} reads back other weights than were written ({error})") from None
    processor = transformers.AutoProcessor.from_pretrained(folder)
    for seed, messages in enumerate(_conversations(native.medium)):
        decoded = noise(native.medium, seed)
        prepared = assistant.encoders[native.medium].prepare(decoded)
        try:
            ours = prompt_batch(assistant, messages, dict.fromkeys(media_in(messages), prepared))
        except DataError:  # a chat template that takes no system turn
            continue
        inputs = processor.apply_chat_template(
            as_chat(messages, dict.fromkeys(media_in(messages), decoded)),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
        if inputs["input_ids"].tolist() != ours.input_ids.tolist():
            raise NotExact(
                f"{native.name} and its processor make {inputs['input_ids'].shape[1]} tokens of a question "
                f"that is {ours.input_ids.shape[1]} here"
            )
        logits = model(**inputs.to(device, dtype=model.dtype)).logits
        expected = logits_of(composite, ours)
        distance, bound = _distance(logits[..., : expected.shape[-1]], expected), TOLERANCE[model.dtype]
        if not distance <= bound:
            raise NotExact(
                f"{native.name} around {composite.config.text_config.model_type} gives other logits, by "
                f"{distance:.2g} of their norm where {bound:g} is rounding"
            )


def _conversations(kind: str) -> list[tuple[Message, ...]]:
    medium = Medium(kind, Path(kind))
    question = Message("user", (medium, "What is this?"))
    return [
        (question,),
        (Message("system", ("Be brief.",)), Message("user", ("Before ", medium, " behind"))),
        (question, Message("assistant", ("A square.",)), Message("user", ("Say it again.",))),
    ]


def _distance(values: Tensor, expected: Tensor) -> float:
    """The norm of the difference, as a share of the norm of `expected`."""
    values, expected = values.float(), expected.float()
    return float((values - expected).norm() / expected.norm())
