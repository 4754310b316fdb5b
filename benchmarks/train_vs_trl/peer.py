"""One run of trl's SFTTrainer, as the package's docstring tells."""

import json
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, List
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from benchmarks.train_vs_trl.kernels import compile_layers, eager_again
from benchmarks.train_vs_trl.measure import Clock, Memory, Watcher
from benchmarks.train_vs_trl.options import IMAGE_TOKEN, Options
from benchmarks.train_vs_trl.prepare import CHAT_TEMPLATE, recipe_of
from finetune.common.progress import quiet_libraries
from finetune.common.run_folder import RunFolder
from finetune.data.media import decode
from finetune.data.rows import read_splits
from finetune.data.sample import Message, Sample
from finetune.model.bindings import bindings_of
from finetune.model.build import load_llm
from finetune.model.run import Run
from finetune.training.samples import TokenizedSample, tokenized


class InSteps:
    """A trainer with `steps`, the numbers of the samples of each step, in place of its sampler."""

    steps: list[list[int]] | None

    def get_train_dataloader(self: Any) -> Any:
        if self.steps is None:
            return super().get_train_dataloader()
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.steps,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )
        return self.accelerator.prepare(loader)


class PairsPeer(InSteps, DPOTrainer):
    """trl's trainer of preferences."""

    def __init__(self, *, steps: list[list[int]] | None, compact: bool, **kwargs: Any) -> None:
        self.steps = steps
        super().__init__(**kwargs)


class RewardsPeer(InSteps, GRPOTrainer):
    """trl's trainer of rewards. A step's questions stand in its batch as often as they are answered."""

    def __init__(self, *, steps: list[list[int]] | None, compact: bool, **kwargs: Any) -> None:
        answers = kwargs["args"].num_generations
        self.steps = steps and [[number for number in step for _ in range(answers)] for step in steps]
        super().__init__(**kwargs)


class Peer(InSteps, SFTTrainer):
    """trl's trainer. `compact`: the head scores only positions whose next token is learned."""

    def __init__(self, *, steps: list[list[int]] | None, compact: bool, **kwargs: Any) -> None:
        self.steps, self.compact = steps, compact
        super().__init__(**kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not self.compact:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")[:, 1:]
        learned = labels != -100
        whole = self.accelerator.unwrap_model(model).get_base_model()
        states = whole.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1][learned]
        logits = whole.get_output_embeddings()(states).float()
        return functional.cross_entropy(logits, labels[learned], reduction="sum") / num_items_in_batch


def train(options: Options, kind: str, language_model: Any = None) -> dict[str, Any]:
    """`language_model`: loaded before, and left as it came but for Liger's kernels and activation checkpoints."""
    memory = Memory()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        quiet_libraries()
        recipe = recipe_of(options, Path(name))
        samples = read_splits(recipe.data, recipe.seed).train
        run = Run.load(RunFolder(Path(name) / "run"), recipe, bindings_of(recipe.data, samples))
        rows = [*tokenized(samples, run)]
        parts, language_model = run.components, language_model or load_llm(run.components)
        model, processor, embeddings = language_model, parts.tokenizer, language_model.get_input_embeddings()
        if options.chosen.media:
            model, processor = make_llava(language_model, parts)
        else:
            model.requires_grad_(False)
        steps = json.loads((options.folder / "steps.json").read_text(encoding="utf-8"))
        count = sum(len(step) for step in steps)
        if "turns" in kind:
            before, rows = len(samples), []
            samples = in_turns(samples)
            count = count * len(samples) // before
        if "compiled" in kind:
            compile_layers(language_model)
        memory.start()

        clock = Clock()
        lengths = [len(row.input_ids) for row in rows] or None
        batch = batch_of(options, kind, count / len(steps), lengths)
        objective = options.chosen.objective
        rewarded = {"reward_funcs": rewards_of(options)} if objective == "grpo" else {}
        trainer = {"dpo": PairsPeer, "grpo": RewardsPeer}.get(objective, Peer)(
            **rewarded,
            steps=steps if "steps" in kind else None,
            compact="compact" in kind,
            model=model,
            args=arguments(options, kind, name, len(steps), batch, parts.dtype),
            train_dataset={"dpo": pairs_of, "grpo": questions_of}.get(objective, dataset_of)(samples, lengths),
            processing_class=processor,
            peft_config=LoraConfig(
                task_type="CAUSAL_LM",
                r=options.rank,
                lora_alpha=2 * options.rank,
                lora_dropout=0.0,
                target_modules=rf"model\.{prefix(options)}layers\.\d+\.\w+\.\w+_proj",  # those of ours
                modules_to_save=["multi_modal_projector"] if options.chosen.media else None,
            ),
        )
        trainer.remove_callback(PrinterCallback)
        watcher = Watcher(load_first_weights(trainer.model, options))
        trainer.add_callback(watcher)
        trainer.train()
        figures = {**clock.figures(), "memory": memory.figures()}
        if rows and objective != "grpo":
            check_equal_inputs(trainer, samples, rows, parts)
        trainer.model.unload()
        language_model.set_input_embeddings(embeddings)
        eager_again(language_model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    watcher.check(losses, falls=objective != "grpo")
    step_samples = count / len(steps) if "steps" in kind else batch[0] * batch[1]
    return {**figures, **watcher.figures(), "step_samples": step_samples, "losses": losses}


def prefix(options: Options) -> str:
    """Of the LLM's layers in the names of the peer's model."""
    return "language_model." if options.chosen.media else ""


def batch_of(options: Options, kind: str, samples: float, lengths: Sequence[int] | None) -> tuple[int, int]:
    """The batch of a device for steps of so many samples, and how many of them are accumulated."""
    count, pieces = max(1, round(samples)), 1
    if options.peer_tokens and lengths and "steps" not in kind:
        pieces = min(count, ceil(samples * sum(lengths) / len(lengths) / options.peer_tokens))
    return -(-count // pieces), pieces


def arguments(options: Options, kind: str, folder: str, steps: int, batch: tuple[int, int], dtype: torch.dtype) -> Any:
    """trl's defaults, but for what makes both sides comparable, or the peer better. `batch`: see `batch_of`."""
    stage = recipe_of(options, Path(folder)).train.stages[0]
    on_gpu = options.device == "cuda"
    config, own = config_of(options, batch[0])
    return config(
        **own,
        gradient_accumulation_steps=batch[1],
        output_dir=folder,
        num_train_epochs=1 if "steps" in kind else options.epochs,  # the plan of steps holds all epochs
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,  # the lengths are a column
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=on_gpu,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.scheduler,
        warmup_steps=stage.warmup if stage.warmup * steps >= 1 else 0.0,  # as ours
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        gradient_checkpointing="checkpointed" in kind,  # trl's default is True: slower, smaller
        use_liger_kernel=on_gpu and find_spec("liger_kernel") is not None and "plain" not in kind,
        bf16=on_gpu and dtype == torch.bfloat16,
        fp16=on_gpu and dtype == torch.float16,
        use_cpu=not on_gpu,
        seed=options.seed,
        data_seed=options.seed,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="steps",
        save_steps=1_000_000,  # one checkpoint at the end, as ours
        report_to=[],
        disable_tqdm=True,
    )


def config_of(options: Options, batch: int) -> tuple[Any, dict[str, Any]]:
    """trl's class of arguments, and what is the objective's own. `batch`: samples at once."""
    own = {"per_device_train_batch_size": batch, "max_length": None}  # the default, 1024, would cut pictures
    if options.chosen.objective == "dpo":
        return DPOConfig, own | {"beta": 0.1}
    if options.chosen.objective == "grpo":
        count, limit = (options.chosen.settings[key] for key in ("answers", "max_new_tokens"))
        return GRPOConfig, {
            "per_device_train_batch_size": count * batch,
            "num_generations": count,
            "max_completion_length": limit,
        }
    return SFTConfig, own | {"assistant_only_loss": True}


def rewards_of(options: Options) -> Any:
    """The workload's reward as trl calls it."""
    reward = options.chosen.reward
    assert reward is not None

    def rewards(completions: Sequence[Any], **columns: Any) -> list[float]:
        return [reward(one[0]["content"]) for one in completions]

    return rewards


def dataset_of(samples: Sequence[Sample], lengths: Sequence[int] | None) -> Dataset:
    """trl's conversational rows; pictures are read when they're needed. Without `lengths`, numbers of characters."""
    messages = [[{"role": turn.role, "content": text_of(turn)} for turn in sample.messages] for sample in samples]
    columns: dict[str, Any] = {
        "messages": messages,
        "length": lengths or [sum(len(turn["content"]) for turn in turns) for turns in messages],
    }
    if not any(sample.media for sample in samples):
        return Dataset.from_dict(columns)
    columns["images"] = [[str(medium.path) for medium in sample.media] for sample in samples]
    return Dataset.from_dict(columns).cast_column("images", List(Image(mode="RGB")))


def pairs_of(samples: Sequence[Sample], lengths: Sequence[int] | None) -> Dataset:
    """trl's rows of preferences."""

    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    columns = {
        "prompt": [said("user", text_of(sample.messages[0])) for sample in samples],
        "chosen": [said("assistant", sample.answer) for sample in samples],
        "rejected": [said("assistant", str(sample.rejected)) for sample in samples],
        "images": [[str(medium.path) for medium in sample.media] for sample in samples],
        "length": list(lengths or [0] * len(samples)),
    }
    return Dataset.from_dict(columns).cast_column("images", List(Image(mode="RGB")))


def questions_of(samples: Sequence[Sample], lengths: Sequence[int] | None) -> Dataset:
    """trl's rows of questions."""
    columns = {
        "prompt": [[{"role": "user", "content": text_of(sample.messages[0])}] for sample in samples],
        "images": [[str(medium.path) for medium in sample.media] for sample in samples],
        "length": list(lengths or [0] * len(samples)),
    }
    return Dataset.from_dict(columns).cast_column("images", List(Image(mode="RGB")))


def text_of(turn: Message) -> str:
    return "".join(part for part in turn.content if isinstance(part, str))


def in_turns(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of each picture as one conversation, the picture before its first question."""
    together: dict[str, list[Sample]] = {}
    for sample in samples:
        together.setdefault(sample.media[0].key, []).append(sample)
    merged = []
    for first, *others in together.values():
        turns = [Message(turn.role, (text_of(turn),)) for sample in others for turn in sample.messages]
        merged.append(Sample((*first.messages, *turns), first.where, first.task))
    return merged


def make_llava(language_model: Any, parts: Any) -> tuple[Any, Any]:
    """LlavaForConditionalGeneration around the loaded parts, and its processor."""
    encoder, image_id = parts.encoders["image"], parts.placeholders["image"].id
    is_vit = hasattr(encoder.module.config, "patch_size")
    config = LlavaConfig(
        # Of a tower that isn't a ViT, the configuration only tells LLaVA the width: the tower itself is put in below.
        vision_config=encoder.module.config
        if is_vit
        else CLIPVisionConfig(hidden_size=encoder.width, num_hidden_layers=1, num_attention_heads=16),
        text_config=language_model.config,
        image_token_index=image_id,
        image_token_id=image_id,
        vision_feature_layer=encoder.options.layer,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    with torch.device(parts.device):
        llava.model.multi_modal_projector = LlavaMultiModalProjector(config).float()
    llava.model.vision_tower = encoder.module if is_vit else make_tower(encoder.module)
    llava.model.language_model = language_model.base_model
    llava.lm_head = language_model.get_output_embeddings()
    make_room(llava, language_model.get_input_embeddings(), image_id)
    llava.requires_grad_(False)
    side = encoder.prepare(blank_picture()).values.shape[-1]
    processor = LlavaProcessor(
        image_processor=encoder.processor,
        tokenizer=parts.tokenizer,
        patch_size=side // round(encoder.layout.rows**0.5),
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )
    return llava, processor


def make_room(llava: Any, table: Any, image_id: int) -> None:
    """LLaVA looks the placeholder up before it puts the picture there: one more row, and none for the head to say."""
    rows, width = table.weight.shape
    if image_id < rows:
        return
    with torch.no_grad():
        longer = nn.Embedding(image_id + 1, width, device=table.weight.device, dtype=table.weight.dtype)
        longer.weight.zero_()[:rows] = table.weight
        if llava.lm_head.weight is table.weight:
            llava.lm_head.weight = nn.Parameter(longer.weight[:rows], requires_grad=False)
    llava.set_input_embeddings(longer)


def make_tower(backbone: Any) -> Any:
    """A convolutional backbone that answers as LLaVA expects of a ViT: the grid as a sequence."""

    class Tower(PreTrainedModel):
        config_class = type(backbone.config)
        main_input_name = "pixel_values"

        def __init__(self) -> None:
            super().__init__(backbone.config)
            self.backbone = backbone

        def train(self, mode: bool = True) -> Any:
            """Always in evaluation mode: else batch norms, though frozen, would follow each batch."""
            return super().train(False)

        def get_input_embeddings(self) -> None:
            return None

        def forward(self, pixel_values: Any, **kwargs: Any) -> Any:
            rows = self.backbone(pixel_values=pixel_values).last_hidden_state.flatten(2).transpose(1, 2)
            return BaseModelOutputWithPooling(last_hidden_state=rows, hidden_states=(rows,))

    return Tower().eval()


def blank_picture() -> Any:
    from PIL import Image as Picture

    return Picture.new("RGB", (64, 64))


def check_equal_inputs(trainer: Any, samples: Sequence[Sample], rows: Sequence[TokenizedSample], parts: Any) -> None:
    """Raises AssertionError where trl's collator and ours make other tokens, labels or features of some samples."""
    few = list(range(min(8, len(rows))))
    batch = trainer.data_collator([trainer.train_dataset[number] for number in few])
    labels = batch.get("labels")
    if labels is None:  # of pairs, the chosen answers come first
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    for place, number in enumerate(few):
        real = batch["attention_mask"][place] == 1
        assert batch["input_ids"][place][real].tolist() == rows[number].input_ids, "other token ids"
        assert labels[place][real].tolist() == rows[number].labels, "other labels"
    if "pixel_values" not in batch:
        return
    batch["pixel_values"] = batch["pixel_values"][: len(few)]
    encoder = parts.encoders["image"]
    pictures = [decode("image", samples[number].media[0].path) for number in few]
    prepared = torch.cat([encoder.prepare(picture).values for picture in pictures])  # a segment each
    assert torch.equal(prepared, batch["pixel_values"]), "other pixels"
    tower = trainer.accelerator.unwrap_model(trainer.model).get_base_model().model.vision_tower
    with torch.no_grad():
        ours = encoder.encode(prepared[:, None])[:, 0]
        output = tower(prepared.to(ours.device, ours.dtype), output_hidden_states=True)
    theirs = output.hidden_states[encoder.options.layer]
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3), "other features"


def load_first_weights(model: Any, options: Options) -> dict[str, Any]:
    """Copy the prepared LoRA and projector into the peer's model, in float32 as ours; two weights whose gradients are
    watched. Raises AssertionError where what trains isn't exactly what was prepared.
    """
    saved = {
        name.replace("model.layers", f"model.{prefix(options)}layers").replace(".weight", ".default.weight"): tensor
        for name, tensor in load_file(options.first_weights / "adapter_model.safetensors").items()
    }
    projector = "base_model.model.model.multi_modal_projector.modules_to_save.default"
    for name, tensor in load_file(options.first_weights / "projectors.safetensors").items():
        layer, kind = name.removeprefix("projectors.image.").split(".")
        saved[f"{projector}.linear_{1 if layer == '0' else 2}.{kind}"] = tensor
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == saved.keys(), f"the peer trains other weights: {sorted(trained.keys() ^ saved.keys())[:4]}"
    for name, tensor in saved.items():
        trained[name].data = tensor.to(trained[name].device, torch.float32)  # trl has made those of QLoRA bfloat16
    # A reference is the model without what PEFT has added: then with the projector that it keeps beside its own.
    kept = dict(model.named_parameters())
    for name, tensor in saved.items():
        if (before := name.replace("modules_to_save.default", "original_module")) != name:
            kept[before].data = tensor.clone().to(kept[before].device, kept[before].dtype)
    watched = {"lora_B": next(p for name, p in trained.items() if "lora_B" in name)}
    if options.chosen.media:
        watched["projector"] = trained[f"{projector}.linear_1.weight"]
    return watched
