"""Before the runs: rows, random weights where they are asked for, first weights of what trains, and the plan of steps.

All that both sides read lies in the folder of `Options`.
"""

import json
import random
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.train_vs_trl import workload
from benchmarks.train_vs_trl.measure import device_name, sizes
from benchmarks.train_vs_trl.options import IMAGE_TOKEN, Options
from finetune.common.progress import console, quiet_libraries
from finetune.common.run_folder import RunFolder
from finetune.model.adapter import load_trained, save_trained
from finetune.model.composite import MultimodalModel
from finetune.model.row_layout import RowKind
from finetune.recipe.load import Recipe
from finetune.training.collate import Collator
from finetune.training.pack import Row
from finetune.training.prepare import PreparedRun, prepare, stage_rows
from finetune.training.rollouts import longest_answers
from finetune.training.samples import TokenizedSamples
from finetune.training.shared import Shared
from finetune.training.train import layout_of, load_composite

# Takes plain text (ours) and lists of parts (trl); trl finds what is learned by its marks. It ends with the end token.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% set content %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '" + IMAGE_TOKEN + "' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}{% endset %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ content }}<|im_end|>{% endif %}"
    "{{ '\n' if not loop.last or add_generation_prompt else '' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
QUICKSTART = workload.ROOT / "weights"
LARGE_LLM = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
LARGE_VISION = {
    "hidden_size": 1152,
    "num_hidden_layers": 27,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


def write_all(options: Options, language_model: Any = None) -> dict[str, Any]:
    """Write to the folder all that both sides read; what the report needs to know of it. `language_model`: loaded
    before, and left as it came.
    """
    options.template.write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_rows(options)
    make_weights(options)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        cache = Path(name)
        shared = shared_over(recipe_of(options, cache), language_model)
        ours = OurTraining.of(options, shared, cache)
        save_trained(ours.model, options.first_weights)
        answers = len(ours.samples) // len(ours.prepared.training)
        steps = [[number for group in row for number in group] for row in ours.rows]
        by_row = [[number // answers for number in step if number % answers == 0] for step in steps]
        (options.folder / "steps.json").write_text(json.dumps(by_row), encoding="utf-8")
        facts = facts_of(ours, steps)
        shared.release()
        return facts


def shared_over(recipe: Recipe, language_model: Any) -> Shared:
    """What a run loads, but for its LLM where that was loaded before."""
    shared = Shared.load(recipe)
    if language_model is not None:
        shared.language_model = language_model
    return shared


def write_rows(options: Options) -> None:
    chosen = options.chosen
    found = chosen.rows(workload.emoji(options.pictures, options.seed), options.questions, random.Random(options.seed))
    with options.rows.open("w", encoding="utf-8") as stream:
        for one in found:
            rejected = {"rejected": one.rejected} if one.rejected else {}
            print(json.dumps({"messages": messages_of(one)} | rejected, ensure_ascii=False), file=stream)
    unused = {"messages": messages_of(workload.Conversation(None, [("?", "!")]))}
    options.unused_rows.write_text(json.dumps(unused) + "\n", encoding="utf-8")


def messages_of(one: workload.Conversation) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(one.turns):
        image = [{"type": "image", "image": one.image}] if one.image and not number else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": answer})
    return messages


def weights_of(options: Options) -> tuple[Path, Path]:
    """Folders of the LLM and the encoder."""
    real = options.parts == "quickstart"
    llm = QUICKSTART / "minimind2-small" if real else options.folder / "llm"
    changed = options.pixels or options.chosen.vision
    return llm, QUICKSTART / "mobilenet-v2" if real and not changed else options.folder / "vision"


def make_weights(options: Options) -> None:
    llm, vision = weights_of(options)
    if options.parts == "given":
        return
    if options.parts == "toy":
        sys.path.insert(0, str(workload.ROOT / "tests/helpers"))
        from tiny import tiny_llm_folder, tiny_vision_folder

        tiny_llm_folder(llm)
        tiny_vision_folder(vision)
        return
    torch.manual_seed(options.seed)
    if options.parts == "large":
        _make_llm(llm)
    if options.parts == "large" or options.chosen.vision:
        make_vision(vision, options.chosen.vision or LARGE_VISION)
    elif options.pixels:
        shutil.copytree(QUICKSTART / "mobilenet-v2", vision)
        config = vision / "preprocessor_config.json"
        side = {"height": options.pixels, "width": options.pixels}
        settings = json.loads(config.read_text()) | {"size": {"shortest_edge": options.pixels}, "crop_size": side}
        config.write_text(json.dumps(settings))


def _make_llm(folder: Path) -> None:
    """Random weights under the quickstart's tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "minimind2-small")
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        **LARGE_LLM,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def make_vision(folder: Path, shape: dict[str, Any]) -> None:
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    SiglipVisionModel(SiglipVisionConfig(**shape, vision_use_head=False)).save_pretrained(folder)
    side = shape["image_size"]
    half = [0.5, 0.5, 0.5]
    SiglipImageProcessor(size={"height": side, "width": side}, image_mean=half, image_std=half).save_pretrained(folder)


def recipe_of(options: Options, cache: Path) -> Recipe:
    """The training as a recipe of the kit. `cache`: folder of features."""
    llm, vision = weights_of(options)
    model: dict[str, Any] = {
        "llm": {"name": str(llm), "quantize": options.quantize, "chat_template": str(options.template)}
    }
    if options.chosen.media:
        # LLaVA takes the last layer but one of a ViT; a convolutional backbone has one output.
        is_vit = options.parts != "quickstart" or options.chosen.vision
        model["encoders"] = {"image": {"kind": "vision", "name": str(vision), "layer": -2 if is_vit else -1}}
        model["projectors"] = {"image": {"kind": "mlp"}}
    task = {"kind": "chat", "media": ["image"] if options.chosen.media else []}
    trains = ["projectors", "adapter"] if options.chosen.media else ["adapter"]
    return Recipe(
        name="benchmark",
        seed=options.seed,
        model=model,
        adapter={"rank": options.rank, "alpha": 2 * options.rank},
        data=[
            {"path": str(options.rows), "task": task, "outside_media_folder": True},
            {"path": str(options.unused_rows), "task": task, "split": "test"},  # a recipe has some
        ],
        train={
            "tokens_per_batch": options.tokens_per_batch,
            "cache_folder": str(cache / "features"),
            "save_every_n_steps": 1_000_000,
            "stages": [
                {
                    "name": "all",
                    "trains": trains,
                    "learning_rate": options.learning_rate,
                    "epochs": options.epochs,
                    "objective": {"kind": options.chosen.objective, **options.chosen.settings},
                }
            ],
        },
    )


@dataclass(frozen=True)
class OurTraining:
    """What `finetune train` has at hand when a stage begins."""

    prepared: PreparedRun
    model: MultimodalModel
    kind: RowKind
    samples: TokenizedSamples
    rows: list[Row]

    @classmethod
    def of(cls, options: Options, shared: Shared, cache: Path, first: bool = False) -> "OurTraining":
        """`first`: with the prepared first weights."""
        quiet_libraries()
        console.quiet = True
        prepared = prepare(RunFolder(cache / "run"), recipe_of(options, cache), shared)
        model = load_composite(prepared.run, shared)
        if first:
            load_trained(model, options.first_weights)
        recipe = prepared.run.recipe
        kind = layout_of(model, prepared.run)
        samples, rows = stage_rows(prepared, recipe.train.stages[0], model, kind, options.seed)
        return cls(prepared, model, kind, samples, rows)


def facts_of(ours: OurTraining, steps: list[list[int]]) -> dict[str, Any]:
    """Counts behind the report. Of `ours` and `peer`: tokens that the LLM reads, keys that these attend to, pictures
    that are projected and encoded, over all epochs; padding isn't among them.
    """
    lengths = ours.samples.lengths
    collator = Collator(ours.samples, lambda medium: torch.zeros(1), field="features", kind=ours.kind)
    learned = [sum(label != -100 for label in labels[1:]) for labels in ours.samples.column("labels")]
    answers, (stage,) = 1, ours.prepared.run.recipe.train.stages
    if stage.objective.samples_answers:  # at their longest; sampling isn't counted
        asked: Any = stage.objective.options
        answers, learned = asked.answers, [asked.answers * asked.max_new_tokens for _ in lengths]
        lengths = [length + asked.max_new_tokens for length in lengths]
        batches = [longest_answers(stage, collator, row) for row in ours.rows]
    else:
        batches = [collator([{"groups": row, "filler": False}]) for row in ours.rows]
    seen = [number for step in steps for number in step]
    pictures = len({medium.key for sample in ours.prepared.training for medium in sample.media})
    with_media = len(seen) if pictures else 0
    return {
        "samples": len(seen),
        "pictures": pictures,
        "steps": len(steps),
        "row_kind": str(ours.kind),
        "lengths": [min(lengths), statistics.mean(lengths), max(lengths)],
        "learned_tokens": sum(learned[number] for number in seen),
        "model": sizes(ours.model, ours.prepared.run.components.encoders.get("image")),
        "ours": {
            "tokens": sum(batch["input_ids"].numel() for batch in batches),
            "pairs": sum(int((batch["position_ids"] + 1).sum()) for batch in batches),
            "projected": sum(len(media) for batch in batches for media in batch["features"].values()),
            "encoded": pictures,
        },
        "peer": {
            "tokens": answers * sum(lengths[number] for number in seen),
            "pairs": answers * sum(lengths[number] * (lengths[number] + 1) // 2 for number in seen),
            "projected": answers * with_media,
            "encoded": answers * with_media,
        },
        "device": device_name(),
    }
