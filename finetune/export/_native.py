"""A composite as one of transformers' own classes, where one fits exactly: LLaVA for pictures, Qwen2-Audio and Audio
Flamingo 3 for sound. Whether it does is measured, on the LLM's head, on the tower, and on the folder that was written.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from finetune.common.errors import DataError, ExportRefused
from finetune.common.registry import part_from
from finetune.data.sample import Medium, Message
from finetune.export._check.probes import as_chat, media_of, noise, prompt_batch
from finetune.model.assistant import Assistant
from finetune.model.chat_template import with_media_parts
from finetune.model.composite import MultimodalModel

# Of the norm of the logits. In half precision the projector is rounded too, which ours keeps in float32.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
LAYERS = {
    "mlp": {"0": "linear_1", "2": "linear_2"},
    "linear": {"": "linear"},
}
AUDIO_CLASSES = {"linear": "Qwen2AudioForConditionalGeneration", "mlp": "AudioFlamingo3ForConditionalGeneration"}


class NotExact(ExportRefused):
    """The class that seemed to fit gives something else; the text says what."""


@dataclass(frozen=True)
class Native:
    """`model_class`: its name in transformers. `medium`: what it takes, 'image' or 'audio'. `last_is_normed`: features
    come from behind the tower's last norm, which its class leaves out unless told.
    """

    model_class: str
    medium: str
    last_is_normed: bool = False


def native_of(composite: MultimodalModel) -> Native | str:
    """The class that holds this model exactly, as far as its parts tell; or why there is none, as half a sentence."""
    parts = composite.config.parts
    if len(parts["encoders"]) != 1:
        return f"it has {len(parts['encoders'])} encoders ({', '.join(parts['encoders'])}), and no class takes them all"
    if parts["fusion"]["kind"] != "prefix":
        return f"its fusion is {parts['fusion']['kind']!r}, which no other class has"
    if composite.heads:
        return f"it has a head of its own ({', '.join(composite.heads)}), which other classes would leave out"
    (name,) = parts["encoders"]
    kind, options = parts["encoders"][name]["kind"], parts["encoders"][name]["settings"]["options"]
    projector, settings = part_from("projectors", parts["projectors"][name])
    if projector == "mlp" and settings.hidden not in (None, composite.config.text_config.hidden_size):
        return f"its projector's hidden layer is {settings.hidden} wide, not as wide as the LLM"
    if (reason := _head_reason(composite.causal_lm)) is not None:
        return reason
    encoder = composite.encoder_parts[name]
    if kind == "vision" and projector == "mlp":
        return _llava(encoder, options)
    if kind == "whisper" and projector in AUDIO_CLASSES:
        if options["pool"] != 2 or options["layer"] != -1:
            return "its Whisper isn't read as those classes do it (`pool: 2`, `layer: -1`)"
        if options["window_seconds"] != 30:
            return f"its Whisper hears {options['window_seconds']:g} seconds at once, those classes 30"
        return Native(AUDIO_CLASSES[projector], name)
    return f"no class has the encoder {kind!r} with the projector {projector!r}"


@torch.no_grad()
def _head_reason(causal_lm: Any) -> str | None:
    """Why the LLM's logits aren't its last states times its head's weights, which is all that other classes do."""
    family = causal_lm.config.get_text_config().model_type
    head, table = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    if getattr(causal_lm.config.get_text_config(), "final_logit_softcapping", None):
        return f"{family} caps its logits, which other classes would leave out"
    embedded = table(torch.arange(3, 35, device=table.weight.device)[None] % len(table.weight))
    mask = torch.ones(embedded.shape[:2], dtype=torch.long, device=embedded.device)
    logits = causal_lm(inputs_embeds=embedded, attention_mask=mask).logits.float()
    states = causal_lm.base_model(inputs_embeds=embedded, attention_mask=mask)[0]
    if states.shape[-1] != head.weight.shape[-1] or _distance(functional.linear(states, head.weight), logits) > 1e-3:
        return f"{family} scales its logits, or adds a bias to them, which other classes would leave out"
    return None


def _llava(encoder: Any, options: dict[str, Any]) -> Native | str:
    """Whether LLaVA reads the tower as this encoder does."""
    if options["tiles"] > 1:
        return "it cuts pictures into tiles, which LLaVA doesn't"
    shape, module = encoder.shape, encoder.module
    kind = module.config.model_type
    if shape.skipped > 1:
        return f"{kind} has {shape.skipped} class and register tokens; LLaVA drops one or none (see `tokens: all`)"
    values = encoder.prepare(noise("image")).values.to(module.device, module.dtype)
    hidden, last = _read_by_llava(module, values, options["layer"])
    patch = getattr(module.config, "patch_size", None)
    if hidden.ndim != 3 or not isinstance(patch, int):
        return f"{kind} doesn't give rows of patches, which LLaVA takes"
    grid = (shape.height // patch) * (shape.width // patch)
    if shape.rows < grid or hidden.shape[1] != shape.rows + shape.skipped:
        return f"{kind} gives {shape.rows} rows, not one a patch, as LLaVA counts them"
    normed = options["layer"] == -1 and _distance(hidden, last) > 1e-6
    if normed and _distance(_read_by_llava(module, values, -1, tie=True)[0], last) > 1e-6:
        return f"LLaVA reads {kind} before its last norm, here it is read behind it (not so with `layer: -2`)"
    return Native("LlavaForConditionalGeneration", "image", last_is_normed=normed)


@torch.no_grad()
def _read_by_llava(module: Any, pixels: Tensor, layer: int, tie: bool = False) -> tuple[Tensor, Tensor]:
    """The hidden state that LLaVA takes (nothing, where there is none), and the last one. `tie`: transformers' switch
    that puts the last one, behind the norm, among the hidden states.
    """
    before = vars(module.config).get("tie_last_hidden_states")
    if tie:
        module.config.tie_last_hidden_states = True
    states = module(pixel_values=pixels, output_hidden_states=True)
    if tie and before is None:
        del module.config.tie_last_hidden_states
    elif tie:
        module.config.tie_last_hidden_states = before
    return (states.hidden_states or [torch.empty(0)])[layer], states.last_hidden_state


def write_native(assistant: Assistant, folder: Path, native: Native, *, check: bool = True) -> None:
    """Write weights, config, processor, chat template and generation config of the class `native` names; with `check`,
    read them back and compare with the composite.

    Raises NotExact where the class holds it otherwise than it seemed. Memory: the model twice.
    """
    composite = assistant.model
    state = _state(composite, native, rows=len(assistant.tokenizer))
    config = _config(assistant, native, state)
    try:
        with torch.device("meta"):
            model = getattr(transformers, native.model_class)(config)
        model.load_state_dict(state, assign=True)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        family = composite.config.text_config.model_type
        reason = " ".join(str(error).split())[:200]
        raise NotExact(f"{native.model_class} can't be built around {family} ({reason})") from None
    model.config.dtype = composite.causal_lm.dtype
    model.generation_config = copy.deepcopy(composite.language_model.generation_config)
    model.save_pretrained(folder)
    _processor(assistant, native, config).save_pretrained(folder)
    if check:
        _compare(assistant, folder, native)


def _state(composite: MultimodalModel, native: Native, rows: int) -> dict[str, Tensor]:
    """Weights by the names of the class. The LLM's table is made as long as the tokenizer, if it is shorter."""
    causal_lm, encoder = composite.causal_lm, composite.encoders[native.medium]
    tower = "vision_tower" if native.medium == "image" else "audio_tower"
    table = causal_lm.get_input_embeddings().weight
    head = causal_lm.get_output_embeddings().weight
    long = lengthened(table, rows)
    head = long if head.data_ptr() == table.data_ptr() else lengthened(head, rows)
    state = {f"model.language_model.{name}": tensor for name, tensor in causal_lm.base_model.state_dict().items()}
    (place,) = {name for name, tensor in state.items() if tensor.data_ptr() == table.data_ptr()}
    state |= {place: long, "lm_head.weight": head}
    state |= {f"model.{tower}.{name}": tensor for name, tensor in encoder.state_dict().items()}
    layers = LAYERS[composite.config.parts["projectors"][native.medium]["kind"]]
    for name, tensor in composite.projectors[native.medium].state_dict().items():
        layer, _, kind = name.rpartition(".")
        state[f"model.multi_modal_projector.{layers[layer]}.{kind}"] = tensor
    dtype = causal_lm.dtype
    return {name: t.detach().to(dtype) if t.is_floating_point() else t for name, t in state.items()}


def lengthened(table: Tensor, rows: int) -> Tensor:
    """A table (V, D) with the mean of its rows behind them: as an output that is the mean of all logits, which is never
    the largest, so that no new token is ever written.
    """
    if rows <= len(table):
        return table
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), -1)])


def _config(assistant: Assistant, native: Native, state: dict[str, Tensor]) -> Any:
    composite = assistant.model
    text = copy.deepcopy(composite.config.text_config)
    text.vocab_size = len(state["lm_head.weight"])
    text.architectures = [type(composite.causal_lm).__name__]
    text.name_or_path = ""  # where its weights once were
    embedded = state.get("model.language_model.embed_tokens.weight")
    # Only LLaVA's class knows that the two may be one, and only under this name.
    text.tie_word_embeddings = (
        native.medium == "image" and embedded is not None and embedded.data_ptr() == state["lm_head.weight"].data_ptr()
    )
    if not text.tie_word_embeddings:  # shared weights would be written once, and the head be missing
        state["lm_head.weight"] = state["lm_head.weight"].clone()
    encoder = composite.encoder_parts[native.medium]
    config_class = getattr(transformers, native.model_class).config_class
    tower = _vision(encoder, native) if native.medium == "image" else _audio(encoder, config_class)
    config = config_class(text_config=text, **tower, tie_word_embeddings=text.tie_word_embeddings)
    token = assistant.placeholders[native.medium].id
    setattr(config, f"{native.medium}_token_id", token)
    generation = composite.language_model.generation_config
    config.eos_token_id, config.bos_token_id = generation.eos_token_id, generation.bos_token_id
    config.pad_token_id = assistant.tokenizer.pad_token_id
    return config


def _vision(encoder: Any, native: Native) -> dict[str, Any]:
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


def _audio(encoder: Any, config_class: Any) -> dict[str, Any]:
    own = encoder.module.config
    tower_class = config_class.sub_configs_defaults["audio_config"]
    config = transformers.AutoConfig.for_model(
        tower_class.model_type,
        d_model=own.d_model,
        encoder_layers=own.encoder_layers,
        encoder_attention_heads=own.encoder_attention_heads,
        encoder_ffn_dim=own.encoder_ffn_dim,
        num_mel_bins=own.num_mel_bins,
        max_source_positions=own.max_source_positions,
        activation_function=own.activation_function,
    )
    return {"audio_config": config}


def _processor(assistant: Assistant, native: Native, config: Any) -> Any:
    """The class's own processor, with a chat template that puts media where ours stand."""
    encoder = assistant.encoders[native.medium]
    tokenizer = copy.deepcopy(assistant.tokenizer)
    tokenizer.chat_template = with_media_parts(tokenizer, assistant.placeholders)
    how = {"tokenizer": tokenizer, "chat_template": tokenizer.chat_template}
    token = assistant.placeholders[native.medium].token
    if native.medium == "image":
        images = copy.deepcopy(encoder.processor)
        # Pixels don't depend on it where nothing is cropped; those who count tokens beforehand read the size off it.
        if not getattr(images, "crop_size", None):
            images.crop_size = {"height": encoder.shape.height, "width": encoder.shape.width}
        images.do_convert_rgb = True
        patch = encoder.module.config.patch_size
        patches = (encoder.shape.height // patch) * (encoder.shape.width // patch)
        return transformers.LlavaProcessor(
            images,
            patch_size=patch,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=encoder.shape.rows + encoder.shape.skipped - patches,
            image_token=token,
            **how,
        )
    settings = encoder.processor.to_dict() | {"return_attention_mask": True}
    sounds = type(encoder.processor).from_dict(settings)
    if native.model_class.startswith("Qwen2Audio"):
        # Nothing marks where sound begins and ends: both are the placeholder, and the template writes neither.
        marks = {"audio_bos_token": token, "audio_eos_token": token}
        return transformers.Qwen2AudioProcessor(sounds, audio_token=token, **marks, **how)
    return transformers.AudioFlamingo3Processor(sounds, audio_token=token, **how)


@torch.no_grad()
def _compare(assistant: Assistant, folder: Path, native: Native) -> None:
    """Token ids and logits of what stands in the folder, on noise. Raises NotExact."""
    model, report = getattr(transformers, native.model_class).from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    wrong = sorted(key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind])
    if wrong:
        raise NotExact(f"{native.model_class} reads back other weights than were written ({wrong[0]})")
    processor = transformers.AutoProcessor.from_pretrained(folder)
    composite = assistant.model
    device = composite.get_input_embeddings().weight.device
    model = model.to(device).eval()
    for messages, decoded in _conversations(native.medium):
        prepared = assistant.encoders[native.medium].prepare(decoded)
        try:
            ours = prompt_batch(assistant, messages, dict.fromkeys(media_of(messages), prepared))
        except DataError:  # a chat template that takes no system turn
            continue
        chat = as_chat(messages, dict.fromkeys(media_of(messages), decoded))
        inputs = processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        if inputs["input_ids"].tolist() != ours["input_ids"].tolist():
            raise NotExact(
                f"{native.model_class} and its processor make {inputs['input_ids'].shape[1]} tokens of a question "
                f"that is {ours['input_ids'].shape[1]} here"
            )
        inputs = inputs.to(device, dtype=model.dtype)
        found = model(**inputs).logits
        expected = composite(**ours).logits
        distance, most = _distance(found[..., : expected.shape[-1]], expected), TOLERANCE[model.dtype]
        if not distance <= most:
            raise NotExact(
                f"{native.model_class} around {composite.config.text_config.model_type} gives other logits, by "
                f"{distance:.2g} of their norm where {most:g} is rounding"
            )


def _conversations(kind: str) -> list[tuple[tuple[Message, ...], Any]]:
    """Each with the decoded medium that stands for all of its media."""
    medium = Medium(kind, Path(kind))
    asked = Message("user", (medium, "What is this?"))
    turns = (asked, Message("assistant", ("A square.",)), Message("user", ("Say it again.",)))
    brief = Message("system", ("Be brief.",))
    return [
        ((asked,), noise(kind)),
        ((brief, Message("user", ("Before ", medium, " behind"))), noise(kind, 1)),
        (turns, noise(kind, 2)),
    ]


def _distance(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, as a share of the norm of what is expected."""
    found, expected = found.float(), expected.float()
    return float((found - expected).norm() / expected.norm())
