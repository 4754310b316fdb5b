"""Random models, tokenizers, pictures and recipes small enough for tests: built in code, nothing fetched."""

import csv
import json
from functools import cache
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from finetune.model.compose import compose
from finetune.model.composite import MultimodalModel
from finetune.model.encoders import vision
from finetune.recipe.parts import EncoderPart, FormatPart, FusionPart, HeadPart, ProjectorPart, TaskPart

VOCABULARY = 128
PLACEHOLDER = 130  # behind the LLM's table, as where a tokenizer has grown
COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": COMMON | {"num_key_value_heads": 2},
    "mistral": COMMON | {"num_key_value_heads": 2},
    "qwen2": COMMON | {"num_key_value_heads": 2},
    "qwen3": COMMON | {"num_key_value_heads": 2, "head_dim": 8},
    "phi": COMMON,
    "phi3": COMMON,
    "gemma2": COMMON | {"num_key_value_heads": 2, "head_dim": 8},
    "gemma3_text": COMMON | {"num_key_value_heads": 2, "head_dim": 8},
    "granite": COMMON | {"num_key_value_heads": 2, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "cohere": COMMON | {"num_key_value_heads": 2, "logit_scale": 0.25},
    "olmo2": COMMON,
    "stablelm": COMMON | {"num_key_value_heads": 4},
    "falcon": COMMON,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": COMMON,
    "opt": COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
}
EXPERTS = COMMON | {"num_key_value_heads": 2, "num_experts_per_tok": 2}
MORE_FAMILIES: dict[str, dict[str, Any]] = {  # of which a few tests make all that they try
    "mixtral": EXPERTS | {"num_local_experts": 4},
    "qwen3_moe": EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8},
    "gpt_oss": EXPERTS | {"num_local_experts": 4, "head_dim": 8, "sliding_window": 8},
    "phimoe": EXPERTS | {"num_local_experts": 4, "router_aux_loss_coef": 0.001},
    "cohere2": COMMON | {"num_key_value_heads": 2, "sliding_window": 8},
    "olmo3": COMMON | {"num_key_value_heads": 2, "sliding_window": 8},
    "glm": COMMON | {"num_key_value_heads": 2, "head_dim": 8},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "lfm2": COMMON | {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    "falcon_h1": COMMON
    | {"num_key_value_heads": 2, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "llama4_text": EXPERTS | {"num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 8},
    "rwkv": COMMON | {"attention_hidden_size": 32},
}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (230, 220, 40)}


def tiny_llm(family: str = "llama", vocabulary: int = VOCABULARY, **changes: Any) -> Any:
    """A causal LM whose attention, head and biases all weigh in: fresh weights are too small for a leak to show."""
    sizes = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(family, **(sizes | (MORE_FAMILIES | FAMILIES)[family] | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@cache
def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["What is this? Describe the picture.", "user assistant system", " ".join(COLOURS), "a red square"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text * 4, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def fresh_tokenizer() -> transformers.PreTrainedTokenizerFast:
    import copy

    return copy.deepcopy(tiny_tokenizer())


def tiny_llm_folder(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """An ordinary folder of a causal LM and its tokenizer; wide enough for nf4 (64 in, 32 out)."""
    tokenizer = fresh_tokenizer()
    torch.manual_seed(0)
    changes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16} | changes
    model = tiny_llm(family, vocabulary=416, eos_token_id=tokenizer.eos_token_id, pad_token_id=0, **changes)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SQUARE = {"height": 32, "width": 32}
VIT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "siglip": ("siglip_vision_model", VIT),
    "clip": ("clip_vision_model", VIT),
    "dinov2": ("dinov2", VIT),
    "dinov2_registers": ("dinov2_with_registers", VIT | {"num_register_tokens": 3}),
    "dinov3": ("dinov3_vit", VIT | {"num_register_tokens": 4}),
    "vit": ("vit", VIT),
    "aimv2": ("aimv2_vision_model", VIT),
    "mobilenet_v2": ("mobilenet_v2", {"image_size": 32, "depth_multiplier": 0.25, "min_depth": 4}),
    "convnext": ("convnext", {"hidden_sizes": [4, 8, 12, 16], "depths": [1, 1, 1, 1], "image_size": 32}),
    "resnet": ("resnet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}),
}


def tiny_backbone(kind: str = "siglip") -> tuple[nn.Module, Any]:
    """A vision backbone and its processor."""
    model_type, sizes = BACKBONES[kind]
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    module = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module, transformers.SiglipImageProcessor(size=SQUARE)


def tiny_encoder(kind: str = "siglip", **options: Any) -> vision.Encoder:
    module, processor = tiny_backbone(kind)
    return vision.wrap(module, processor, vision.Options(name="tiny", **options))


def tiny_vision_folder(folder: Path, kind: str = "siglip") -> Path:
    torch.manual_seed(1)
    module, processor = tiny_backbone(kind)
    module.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


PARTS = {
    "projectors": ProjectorPart,
    "fusion": FusionPart,
    "heads": HeadPart,
    "tasks": TaskPart,
    "encoders": EncoderPart,
    "formats": FormatPart,
}


def part(folder: str, name: str, **options: Any) -> Any:
    return PARTS[folder].of(name, **options)


FUSIONS: dict[str, dict[str, Any]] = {  # with gates that are open, so that something is to be seen
    "prefix": {},
    "cross_attention": {"every": 1, "heads": 2, "head_width": 8, "gate": 0.7},
}


def tiny_composite(
    family: str = "llama", projector: str = "pixel_shuffle", encoder: Any = None, fusion: str = "prefix"
) -> MultimodalModel:
    """A composite of 16 patches: with pixel_shuffle a picture is 4 placeholder tokens, or 1 for cross-attention."""
    return compose(
        tiny_llm(family),
        encoders={"image": encoder or tiny_encoder()},
        projectors={"image": part("projectors", projector)},
        fusion=part("fusion", fusion, **FUSIONS[fusion]),
        placeholder_ids={"image": PLACEHOLDER},
    )


def tiny_picture(colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (40, 30)) -> PIL.Image.Image:
    return PIL.Image.new("RGB", size, colour)


def tiny_dataset(folder: Path, train: int = 12, test: int = 8) -> Path:
    """train.csv and test.csv with 'image,label': squares of a colour, each its own shade; the label is the colour."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "label"])
            for number in range(count):
                label, (red, green, blue) = list(COLOURS.items())[number % len(COLOURS)]
                name = f"images/{split}{number}.png"
                tiny_picture((red, green + 10 * (split == "test"), min(blue + number, 255))).save(folder / name)
                writer.writerow([name, label])
    return folder


def tiny_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe that trains on a CPU in seconds, all of it below `folder`. `changes`: dotted keys with __ for dots."""
    llm, encoder, data = folder / "llm", folder / "encoder", folder / "data"
    if not llm.is_dir():
        tiny_llm_folder(llm)
        tiny_vision_folder(encoder)
    if not (data / "train.csv").is_file():
        tiny_dataset(data)
    recipe: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "model": {
            "llm": {"name": str(llm), "quantize": "none"},
            "encoders": {"image": {"kind": "vision", "name": str(encoder)}},
            "projectors": {"image": {"kind": "pixel_shuffle"}},
        },
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": [
            {"path": str(data / "train.csv"), "task": "classify"},
            {"path": str(data / "test.csv"), "task": "classify", "split": "test"},
        ],
        "train": {
            "tokens_per_batch": 96,
            "cache_folder": str(folder / "cache"),
            "stages": [
                {"name": "align", "trains": ["projectors"], "learning_rate": 1.0e-3},
                {"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 5.0e-3, "epochs": 2},
            ],
        },
        "evaluate": {"max_new_tokens": 4, "limit": 4},
        "merge": {"rows": 4},
    }
    for key, value in changes.items():
        *above, last = key.split("__")
        section = recipe
        for name in above:
            section = section.setdefault(name, {})
        section[last] = value
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=2))  # JSON is YAML
    return path
