"""Train the same model both ways and compare speed, memory and losses.

    python benchmarks/train_vs_trl.py                        # CPU: MiniMind2-Small, MobileNetV2, emoji, nf4
    python benchmarks/train_vs_trl.py --device cuda          # shapes of a 7B LLM and SigLIP-so400m, random weights
    python benchmarks/train_vs_trl.py --rows 48 --epochs 1   # a quick try

peer  trl's SFTTrainer on transformers' LlavaForConditionalGeneration: a LlavaProcessor, conversational
      prompt-completion rows with an `images` column, and so trl's own vision collator, fused head and padding. PEFT by
      `peft_config`, the projector by `modules_to_save`. Its defaults but for what is listed in `peer_arguments`.
ours  what `finetune train` does: tokenize, encode each picture once, packed rows, `trainer.train_stage`. Its seconds
      include tokenizing and encoding; loading weights is in neither side's.

The same on both sides: LLM weights and quantization (one loader), encoder weights, first projector and LoRA weights
(written once by a preparing process, read by both), chat template, samples, their order, the samples of each
optimizer step, learning rates, precision, seeds, no dropout. Every run is a fresh process of this file. A peer's
process checks, before it trains, that token ids, labels and the encoder's features of some samples equal ours; both
sides check that the projector and the LoRA get gradients that aren't zero, and that the loss falls.

Names of runs: `peer`, `ours` without activation checkpoints; `peer-checkpointed` (trl's default), `ours-checkpointed`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUNS = ("peer", "ours", "peer-checkpointed", "ours-checkpointed")
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
IMAGE_TOKEN = "<|image|>"

# One template for both sides: takes plain text (ours) and lists of parts (trl). It ends with the end token: models' own
# ChatML templates put a line break behind it, which trl learns and the kit leaves to the next turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '" + IMAGE_TOKEN + "' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}<|im_end|>"
    "{{ '\n' if not loop.last or add_generation_prompt else '' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)


# --------------------------------------------------------------------------------------------------------------------
# Options and the order of things. This process imports no torch: its memory is no one's.


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where both sides train")
    parser.add_argument(
        "--model", choices=("real", "random"), help="real small weights (default on cpu), or random ones (on cuda)"
    )
    parser.add_argument(
        "--runs", nargs="+", choices=RUNS, help="processes, in this order (default: see the end of this help)"
    )
    parser.add_argument("--rows", type=int, help="samples an epoch (default: all of train.csv; 256 of random ones)")
    parser.add_argument("--epochs", type=int, default=3, help="passes (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="samples of an optimizer step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="peak, cosine (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA; alpha is twice that (default: %(default)s)")
    parser.add_argument("--quantize", choices=("nf4", "none"), default="nf4", help="of the LLM (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="computed with; auto: float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--seed", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--show-every", type=int, help="steps between rows of the loss table (default: about 12 rows)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    real = parser.add_argument_group("--model real")
    real.add_argument("--llm", type=Path, default=ROOT / "weights/minimind2-small", help="folder (Llama-like)")
    real.add_argument("--encoder", type=Path, default=ROOT / "weights/mobilenet-v2", help="folder of a MobileNetV2")
    real.add_argument("--table", type=Path, default=ROOT / "recipes/data/emoji/train.csv", help="columns image, label")
    real.add_argument("--prompt", default="这是什么？", help="asked about each picture (default: %(default)s)")
    shape = parser.add_argument_group("--model random (defaults: Qwen2.5-7B, SigLIP-so400m at 384 pixels)")
    for name, default in {
        "hidden": 3584, "layers": 28, "intermediate": 18944, "heads": 28, "kv-heads": 4, "vocabulary": 152064,
        "vision-hidden": 1152, "vision-layers": 27, "vision-intermediate": 4304, "vision-heads": 16,
        "image-size": 384, "patch": 14, "text-low": 30, "text-high": 300,
    }.items():  # fmt: skip
        shape.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--process", help=argparse.SUPPRESS)  # what a process of this file does: prepare, or a run
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.epilog = (
        "default runs: cpu: peer ours peer ours peer-checkpointed; cuda (7B and images need checkpoints): "
        "peer-checkpointed ours-checkpointed twice"
    )
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    options.model = options.model or ("real" if on_cpu else "random")
    on_cuda = ["peer-checkpointed", "ours-checkpointed", "peer-checkpointed", "ours-checkpointed"]
    options.runs = options.runs or (["peer", "ours", "peer", "ours", "peer-checkpointed"] if on_cpu else on_cuda)
    if options.model == "random":
        options.rows = options.rows or 256
    return options


def main() -> None:
    options = parse_arguments()
    if options.process:
        result = prepare(options) if options.process == "prepare" else run(options)
        write_result(options.folder, options.process, result)
        return
    with tempfile.TemporaryDirectory(prefix="train_vs_trl_") as name:
        folder = Path(name)
        facts = in_a_process(folder, "prepare", options)
        results = []
        for number, kind in enumerate(options.runs, start=1):
            print(f"run {number} of {len(options.runs)}: {kind}", file=sys.stderr, flush=True)
            results.append(in_a_process(folder, kind, options))
        report(options, facts, results)
        if options.json:
            everything = {"options": vars(options), "machine": machine_line(facts), "facts": facts, "runs": results}
            options.json.write_text(json.dumps(everything, indent=1, default=str) + "\n", encoding="utf-8")


def in_a_process(folder: Path, process: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one part of the work in a fresh process of this file; what it found. Shows its messages where it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, __file__, *sys.argv[1:], "--process", process, "--folder", str(folder)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-6000:]}\n{process} failed with exit status {done.returncode}")
    return json.loads((folder / f"{process}.json").read_text(encoding="utf-8"))


def write_result(folder: Path, process: str, result: dict[str, Any]) -> None:
    (folder / f"{process}.json").write_text(json.dumps(result), encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------------
# Preparing: rows, random weights where asked for, first weights of what is trained, and the counts behind the FLOPs.


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Write to the folder all that both sides read; what the report needs to know of it."""
    import random

    import torch

    from finetune.model.adapter import save_trained

    (options.folder / "template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    if options.model == "random":
        make_random_weights(options)
        make_random_rows(options)
    run, samples, rows_as_tokens = our_run(options)
    generator = random.Random(options.seed)
    rows: list[list[int]] = []
    for _ in range(options.epochs):
        order = list(range(len(samples)))
        generator.shuffle(order)
        rows += [order[i : i + options.batch] for i in range(0, len(order) - options.batch + 1, options.batch)]
    if not rows:
        raise SystemExit(f"{len(samples)} rows don't fill one batch of {options.batch}")
    (options.folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")

    model = run.build(with_encoders=False)
    save_trained(model, options.folder / "first")

    encoder = run.components.encoders["image"]
    lengths = rows_as_tokens.lengths
    learned = [sum(label != -100 for label in labels) for labels in rows_as_tokens.column("labels")]
    assert options.model == "real" or min(learned) > options.text_low, "words of the random texts got lost"
    config = model.causal_lm.config.get_text_config()
    seen = [number for row in rows for number in row]
    projector = [module.weight.numel() for module in model.projectors["image"] if isinstance(module, torch.nn.Linear)]
    facts = {
        "samples": len(seen),
        "pictures": len(set(seen)),
        "steps": len(rows),
        "lengths": [min(lengths), statistics.mean(lengths), max(lengths)],
        "tokens": sum(lengths[number] for number in seen),
        "padded_tokens": sum(len(row) * max(lengths[number] for number in row) for row in rows),
        "learned_tokens": sum(learned[number] for number in seen),
        "image_rows": encoder.layout.rows * len(seen),
        "pairs": sum(lengths[number] * (lengths[number] + 1) // 2 for number in seen),
        "frozen": linear_weights(model.causal_lm.base_model),
        "head": config.vocab_size * config.hidden_size,
        "lora": sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name),
        "projector": projector,
        "attention_width": config.num_attention_heads
        * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads),
        "layers": config.num_hidden_layers,
        "encoder_flops": encoder_flops(encoder),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "dtype": str(run.components.dtype).removeprefix("torch."),
    }
    facts["flops"] = sum(model_flops(facts).values())
    return facts


def model_flops(facts: dict[str, Any]) -> dict[str, float]:
    """Floating-point operations that the training needs, by part. Only real tokens count; nothing is counted twice."""
    first, second = facts["projector"]
    return {
        "frozen layers: 2 N t forward + 2 N t backward to inputs": 4.0 * facts["frozen"] * facts["tokens"],
        "head, at learned tokens only: the same": 4.0 * facts["head"] * facts["learned_tokens"],
        "attention: 2 products of 2 d per causal pair and layer; twice that backward": 12.0
        * facts["attention_width"]
        * facts["layers"]
        * facts["pairs"],
        "LoRA: forward, inputs, weights": 6.0 * facts["lora"] * facts["tokens"],
        "projector: the same, less the inputs' gradient of its first layer": facts["image_rows"]
        * (4.0 * first + 6.0 * second),
        "encoder: forward, once a picture": float(facts["encoder_flops"]) * facts["pictures"],
    }


def linear_weights(module: Any) -> int:
    """Weights of the frozen linear layers, 4-bit ones unpacked; LoRA's own left out."""
    import torch

    return sum(
        part.in_features * part.out_features
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.Linear) and "lora_" not in name
    )


def encoder_flops(encoder: Any) -> int:
    """Operations of one picture's forward, as torch counts them."""
    import torch
    from PIL import Image
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder.encode(encoder.prepare(Image.new("RGB", (64, 64))).values[None])
    return counter.get_total_flops()


def make_random_weights(options: argparse.Namespace) -> None:
    """An LLM, its word-level tokenizer and a vision tower of the asked shapes, as folders that any loader reads."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoModelForCausalLM,
        PreTrainedTokenizerFast,
        Qwen2Config,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    words = ["[UNK]", "user", "assistant", *(f"w{i}" for i in range(word_count(options)))]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        unk_token="[UNK]",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    # Not in the LLM's folder: AutoTokenizer would take Qwen's byte-level class there, to which all words are unknown.
    tokenizer.save_pretrained(options.folder / "llm")
    config = Qwen2Config(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        intermediate_size=options.intermediate,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        vocab_size=options.vocabulary,
        rope_theta=1e6,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with device:
        language_model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    language_model.save_pretrained(options.folder / "llm")
    del language_model
    vision = SiglipVisionConfig(
        hidden_size=options.vision_hidden,
        num_hidden_layers=options.vision_layers,
        intermediate_size=options.vision_intermediate,
        num_attention_heads=options.vision_heads,
        image_size=options.image_size,
        patch_size=options.patch,
        vision_use_head=False,
    )
    with device:
        tower = SiglipVisionModel(vision).to(dtype)
    tower.save_pretrained(options.folder / "encoder")
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": options.image_size, "width": options.image_size},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (options.folder / "encoder" / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")


def word_count(options: argparse.Namespace) -> int:
    return min(2000, options.vocabulary - 16)


def make_random_rows(options: argparse.Namespace) -> None:
    """Pictures of noise, answers of random words whose number is log-normal (median 90) between the two limits."""
    import csv
    import random

    import numpy
    from PIL import Image

    generator, noise = random.Random(options.seed), numpy.random.default_rng(options.seed)
    with (options.folder / "rows.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "label"])
        for number in range(options.rows):
            pixels = noise.integers(0, 256, (options.image_size, options.image_size, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(options.folder / f"{number}.png", compress_level=1)
            length = min(options.text_high, max(options.text_low, round(generator.lognormvariate(4.5, 0.6))))
            # Squared, so that some words are frequent: something to learn.
            words = (f"w{int(generator.random() ** 2 * word_count(options))}" for _ in range(length))
            writer.writerow([f"{number}.png", " ".join(words)])


# --------------------------------------------------------------------------------------------------------------------
# What both sides share.


def our_recipe(options: argparse.Namespace, cache_folder: Path | None = None) -> Any:
    """The training as a recipe of the kit; `cache_folder`: of features."""
    from finetune.recipe.load import Recipe

    random = options.model == "random"
    prompt = "w1 w2 w3" if random else options.prompt
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "seed": options.seed,
            "model": {
                "llm": {
                    "name": str(options.folder / "llm" if random else options.llm),
                    "quantize": options.quantize,
                    "dtype": options.dtype,
                    "chat_template": options.folder / "template.jinja",
                },
                "encoders": {
                    "image": {
                        "kind": "vision",
                        "name": str(options.folder / "encoder" if random else options.encoder),
                        "layer": -2 if random else -1,  # LLaVA's choice for ViTs; a convolutional backbone has no -2
                    }
                },
                "projectors": {"image": "mlp"},
            },
            "adapter": {"rank": options.rank, "alpha": 2 * options.rank},
            "data": [
                {
                    "path": options.folder / "rows.csv" if random else options.table,
                    "task": {"kind": "caption", "prompt": prompt, "caption": "label"},
                }
            ],
            "train": {
                "tokens_per_batch": 1_000_000,
                "cache": cache_folder is not None,
                "cache_folder": cache_folder,
                "save_every_n_steps": 1_000_000,
                "stages": [
                    {
                        "name": "all",
                        "trains": ["projectors", "adapter"],
                        "learning_rate": options.learning_rate,
                        "epochs": options.epochs,
                    }
                ],
            },
        }
    )


def our_run(options: argparse.Namespace, cache_folder: Path | None = None) -> tuple[Any, list[Any], Any]:
    """The kit's run (tokenizer, encoder, features), the rows of the table, and the same tokenized."""
    from finetune.common.progress import quiet_libraries
    from finetune.common.run_folder import RunFolder
    from finetune.data.rows import read_splits
    from finetune.model.bindings import bindings_of
    from finetune.model.run import Run
    from finetune.training.samples import TokenizedSamples, tokenized

    quiet_libraries()
    recipe = our_recipe(options, cache_folder)
    samples = read_splits(recipe.data, recipe.seed).train[: options.rows]
    run = Run.load(RunFolder(options.folder / "run"), recipe, bindings_of(recipe.data, samples))
    return run, samples, TokenizedSamples.of(tokenized(samples, run))


class Memory:
    """Peaks of this process: resident on a CPU, allocated on a GPU. `start` begins a new peak after loading."""

    def __init__(self) -> None:
        self.before = 0
        self.at_start = 0

    def start(self) -> None:
        import gc

        import torch

        gc.collect()
        self.before = self.peak()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak (VmHWM) is now what is resident
        self.at_start = self.peak()

    def peak(self) -> int:
        """What getrusage's ru_maxrss says, but resettable and not inherited from the parent process."""
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def figures(self) -> dict[str, int]:
        peak = self.peak()
        return {"loaded": self.at_start, "training": peak - self.at_start, "process": max(self.before, peak)}


def make_watcher(gradients: dict[str, Any]) -> Any:
    """A trainer callback: the end of each step, and the first step's gradient norms of the named weights."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.norms: dict[str, float] = {}

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not self.norms:
                self.norms = {
                    name: 0.0 if weight.grad is None else float(weight.grad.float().norm())
                    for name, weight in gradients.items()
                }

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.ends.append(perf_counter())

        def check(self, losses: list[float]) -> None:
            """Raises AssertionError where nothing was learned."""
            assert self.norms and all(norm > 0 for norm in self.norms.values()), f"a gradient is zero: {self.norms}"
            third = max(1, len(losses) // 3)
            first, last = statistics.mean(losses[:third]), statistics.mean(losses[-third:])
            assert len(losses) < 2 or last < first, f"the loss doesn't fall: {first} -> {last}"

        def step_seconds(self) -> float:
            """The median step; the first, which warms up, isn't among them."""
            gaps = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
            return statistics.median(gaps) if gaps else float("nan")

    return Watcher()


def matmul_peak(dtype: Any) -> float:
    """FLOP/s of a large matrix product in the dtype computed with: the best of several."""
    import torch

    on_gpu = torch.cuda.is_available()
    side, times = (8192, 30) if on_gpu else (2048, 8)
    left, right = (torch.randn(side, side, dtype=dtype, device="cuda" if on_gpu else "cpu") for _ in range(2))
    best = float("inf")
    for _ in range(times):
        begin = perf_counter()
        left @ right
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, perf_counter() - begin)
    return 2 * side**3 / best


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One run, in its own process."""
    checkpointed = options.process.endswith("-checkpointed")
    train = train_ours if options.process.startswith("ours") else train_peer
    result, dtype = train(options, checkpointed)
    return {"kind": options.process, **result, "matmul_peak": matmul_peak(dtype)}


# --------------------------------------------------------------------------------------------------------------------
# Ours.


def train_ours(options: argparse.Namespace, checkpointed: bool) -> tuple[dict[str, Any], Any]:
    from finetune.model.adapter import load_trained
    from finetune.model.language_model import packs_exactly
    from finetune.model.trainable import set_trainable, trained_parts
    from finetune.training.collate import Collator
    from finetune.training.feature_cache import fill_cache
    from finetune.training.stopping import StopBetweenSteps
    from finetune.training.trainer import StageTraining, train_stage

    memory = Memory()
    rows = json.loads((options.folder / "rows.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(dir=options.folder) as run_folder:
        begin = perf_counter()
        run, samples, rows_as_tokens = our_run(options, Path(run_folder) / "features")
        settings, components = run.recipe.train, run.components
        tokenized_at = perf_counter()
        fill_cache([medium for sample in samples for medium in sample.media], run.features, settings)
        components.encoders["image"].module.to("cpu")
        encoded_at = perf_counter()

        model = run.build(with_encoders=False)
        load_trained(model, options.folder / "first")
        memory.start()

        train_begin = perf_counter()
        if checkpointed:
            model.causal_lm.activation_checkpointing_enable(every_n_layers=1)
        stage = settings.stages[0]
        set_trainable(model, stage.trains)
        trained = trained_parts(model, stage.trains)
        collator = Collator(
            rows_as_tokens,
            run.features.features,
            field="features",
            packed=packs_exactly(model.causal_lm),
            pad_token_id=components.tokenizer.pad_token_id,
        )
        watcher = make_watcher(
            {
                "projector": trained["projectors.image"][0],
                "lora_B": next(p for p in trained["adapter"] if p.shape[1] == options.rank),
            }
        )
        training = StageTraining(
            model=model,
            tokenizer=components.tokenizer,
            stage=stage,
            settings=settings,
            collator=collator,
            rows=rows,
            folder=Path(run_folder) / "checkpoints",
            seed=options.seed,
            dtype=components.dtype,
        )
        with StopBetweenSteps() as stop:
            log = train_stage(training, stop, callbacks=[watcher])
        seconds = {
            "tokenize": tokenized_at - begin,
            "encode": encoded_at - tokenized_at,
            "train": perf_counter() - train_begin,
        }
    losses = [entry["loss"] for entry in log]
    watcher.check(losses)
    result = {
        "seconds": seconds,
        "step_seconds": watcher.step_seconds(),
        "losses": losses,
        "memory": memory.figures(),
        "gradients": watcher.norms,
    }
    return result, components.dtype


# --------------------------------------------------------------------------------------------------------------------
# The peer.


def train_peer(options: argparse.Namespace, checkpointed: bool) -> tuple[dict[str, Any], Any]:
    from peft import LoraConfig
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTTrainer

    from finetune.model.build import load_llm

    memory = Memory()
    rows = json.loads((options.folder / "rows.json").read_text(encoding="utf-8"))
    run, samples, rows_as_tokens = our_run(options)  # the peer takes its tokenizer, and its encoder's very weights
    parts = run.components
    image_id = parts.placeholders["image"].id
    llava, processor = make_llava(load_llm(parts), parts, image_id)
    dataset = peer_dataset([samples[number] for row in rows for number in row])
    check_equal_inputs(processor, dataset, llava, parts, samples, rows_as_tokens, rows[0])
    memory.start()

    with tempfile.TemporaryDirectory(dir=options.folder) as run_folder:
        begin = perf_counter()
        trainer = SFTTrainer(
            model=llava,
            args=peer_arguments(options, run_folder, checkpointed, steps=len(rows)),
            train_dataset=dataset,
            processing_class=processor,
            peft_config=LoraConfig(
                task_type="CAUSAL_LM",
                r=options.rank,
                lora_alpha=2 * options.rank,
                lora_dropout=0.0,
                target_modules=r".*language_model\.layers\.\d+\.\w+\.\w+_proj",  # those of ours
                modules_to_save=["multi_modal_projector"],
            ),
        )
        trainer.remove_callback(PrinterCallback)
        watched = load_first_weights(trainer.model, options.folder / "first")
        watcher = make_watcher(watched)
        trainer.add_callback(watcher)
        trainer.train()
        seconds = {"train": perf_counter() - begin}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    watcher.check(losses)
    result = {
        "seconds": seconds,
        "step_seconds": watcher.step_seconds(),
        "losses": losses,
        "memory": memory.figures(),
        "gradients": watcher.norms,
    }
    return result, parts.dtype


def peer_arguments(options: argparse.Namespace, folder: str, checkpointed: bool, steps: int) -> Any:
    """trl's defaults, but for what makes both sides comparable, or the peer better."""
    from trl import SFTConfig

    stage = our_recipe(options).train.stages[0]
    return SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=options.batch,
        num_train_epochs=1,  # the samples of all epochs are laid out in the dataset, in the order of ours
        train_sampling_strategy="sequential",
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.scheduler,
        warmup_steps=stage.warmup if stage.warmup * steps >= 1 else 0.0,  # as ours
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        optim=stage.optimizer,
        max_length=None,  # the default, 1024, would cut pictures
        gradient_checkpointing=checkpointed,  # trl's default is True: slower, smaller
        bf16=options.device == "cuda" and options.dtype in ("auto", "bfloat16"),  # the default; ours is fp32 on a CPU
        use_cpu=options.device == "cpu",
        seed=options.seed,
        data_seed=options.seed,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="steps",
        save_steps=1_000_000,  # one checkpoint at the end, as ours
        report_to=[],
        disable_tqdm=True,
    )


def make_llava(language_model: Any, parts: Any, image_id: int) -> tuple[Any, Any]:
    """LlavaForConditionalGeneration around the loaded parts, and its processor."""
    import torch
    from torch import nn
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    encoder = parts.encoders["image"]
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
    table = language_model.get_input_embeddings()
    rows, width = table.weight.shape
    if image_id >= rows:
        # LLaVA looks the placeholder up before it puts the picture there: one more row, and none for the head to say.
        with torch.no_grad():
            longer = nn.Embedding(image_id + 1, width, device=parts.device, dtype=table.weight.dtype)
            longer.weight.zero_()[:rows] = table.weight
            if llava.lm_head.weight is table.weight:
                llava.lm_head.weight = nn.Parameter(longer.weight[:rows], requires_grad=False)
        llava.set_input_embeddings(longer)
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


def make_tower(backbone: Any) -> Any:
    """A convolutional backbone that answers as LLaVA expects of a ViT: the grid as a sequence."""
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling

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
    from PIL import Image

    return Image.new("RGB", (64, 64))


def peer_dataset(samples: list[Any]) -> Any:
    """trl's conversational prompt-completion rows; pictures are read when they're needed."""
    from datasets import Dataset, Image, List

    dataset = Dataset.from_dict(
        {
            "images": [[str(medium.path) for medium in sample.media] for sample in samples],
            "prompt": [[{"role": "user", "content": question(sample)}] for sample in samples],
            "completion": [[{"role": "assistant", "content": sample.answer}] for sample in samples],
        }
    )
    return dataset.cast_column("images", List(Image(mode="RGB")))


def question(sample: Any) -> str:
    return "".join(part for part in sample.question[0].content if isinstance(part, str))


def check_equal_inputs(
    processor: Any, dataset: Any, llava: Any, parts: Any, samples: list[Any], tokens: Any, row: list[int]
) -> None:
    """Raises AssertionError where trl's collator and ours make other tokens, labels or features of the first batch."""
    import torch
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    from finetune.data.media import decode

    collator = DataCollatorForVisionLanguageModeling(processor=processor, completion_only_loss=True)
    batch = collator([dataset[place] for place in range(len(row))])
    for place, number in enumerate(row):
        real = batch["attention_mask"][place] == 1
        assert batch["input_ids"][place][real].tolist() == tokens[number].input_ids, "other token ids"
        assert batch["labels"][place][real].tolist() == tokens[number].labels, "other labels"
    encoder = parts.encoders["image"]
    few = row[:4]
    paths = [samples[number].media[0].path for number in few]
    prepared = torch.cat([encoder.prepare(decode("image", path)).values for path in paths])  # a segment each
    assert torch.equal(prepared, batch["pixel_values"][: len(few)]), "other pixels"
    with torch.no_grad():  # of the tower only: 4-bit layers must not answer without gradients before training
        ours = encoder.encode(prepared[:, None])[:, 0]
        output = llava.model.vision_tower(prepared.to(ours.device, ours.dtype), output_hidden_states=True)
    theirs = output.hidden_states[encoder.options.layer]
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3), "other features"


def load_first_weights(model: Any, folder: Path) -> dict[str, Any]:
    """Copy the prepared LoRA and projector into the peer's model; two weights whose gradients are watched.

    Raises AssertionError where what is trained isn't exactly what was prepared, in float32.
    """
    import torch
    from safetensors.torch import load_file

    saved = {
        name.replace("base_model.model.model.layers", "base_model.model.model.language_model.layers").replace(
            ".weight", ".default.weight"
        ): tensor
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    prefix = "base_model.model.model.multi_modal_projector.modules_to_save.default"
    for name, tensor in load_file(folder / "projectors.safetensors").items():
        layer, kind = name.removeprefix("projectors.image.").split(".")
        saved[f"{prefix}.linear_{1 if layer == '0' else 2}.{kind}"] = tensor
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == saved.keys(), f"the peer trains other weights: {sorted(trained.keys() ^ saved.keys())[:4]}"
    with torch.no_grad():
        for name, tensor in saved.items():
            assert trained[name].dtype == torch.float32, f"{name} is {trained[name].dtype}"
            trained[name].copy_(tensor)
    return {
        "projector": trained[f"{prefix}.linear_1.weight"],
        "lora_B": next(p for name, p in trained.items() if "lora_B" in name),
    }


# --------------------------------------------------------------------------------------------------------------------
# The report.


def report(options: argparse.Namespace, facts: dict[str, Any], results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(machine_line(facts))
    low, mean, high = facts["lengths"]
    console.print(
        f"{facts['samples']:,} samples ({facts['pictures']:,} pictures, {options.epochs} epochs) in {facts['steps']:,} "
        f"steps of {options.batch}; {low} to {high} tokens a sample, mean {mean:.0f}; of the peer's tokens "
        f"{1 - facts['tokens'] / facts['padded_tokens']:.0%} are padding, of ours none"
    )
    peak = max(result["matmul_peak"] for result in results)
    table = Table()
    table.add_column("run")
    for heading in ("samples/s", "seconds", "median step", "peak above loaded", "peak of process", "loss", "of peak"):
        table.add_column(heading, justify="right")

    def add(name: str, group: list[dict[str, Any]]) -> None:
        seconds = statistics.mean(total_seconds(result) for result in group)
        table.add_row(
            name,
            f"{facts['samples'] / seconds:.2f}",
            f"{seconds:.1f}",
            f"{statistics.mean(result['step_seconds'] for result in group) * 1000:,.0f} ms",
            size(statistics.mean(result["memory"]["training"] for result in group)),
            size(statistics.mean(result["memory"]["process"] for result in group)),
            f"{statistics.mean(last_loss(result) for result in group):.4f}",
            f"{facts['flops'] / seconds / peak:.1%}",
        )

    for result in results:
        add(result["kind"], [result])
    groups = {kind: [r for r in results if r["kind"] == kind] for kind in RUNS}
    groups = {kind: group for kind, group in groups.items() if group}
    table.add_section()
    for kind, group in groups.items():
        if len(group) > 1:
            add(f"{kind}, mean of {len(group)}", group)
    for ours in (kind for kind in groups if kind.startswith("ours")):
        for peer in (kind for kind in groups if kind.startswith("peer")):
            table.add_row(*ratio_row(f"{ours} / {peer}", groups[ours], groups[peer]))
    console.print(table)
    for result in (group[0] for kind, group in groups.items() if kind.startswith("ours")):
        spent = ", ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items())
        console.print(f"seconds of {result['kind']}: {spent}")
    console.print(
        f"of peak: model FLOPs / seconds, over {peak / 1e9:,.0f} GFLOP/s, the best {facts['dtype']} matrix product in "
        f"these runs. Model FLOPs {facts['flops'] / 1e12:.2f} T, real tokens only, N weights, t tokens:"
    )
    for what, value in model_flops(facts).items():
        console.print(f"  {value / facts['flops']:6.1%}  {what}")
    memory = "CUDA memory allocated" if options.device == "cuda" else "resident memory (VmHWM, as ru_maxrss)"
    console.print(f"peak: {memory}; 'above loaded': less what it was with all weights loaded, before training")
    losses(console, options, groups)


def losses(console: Any, options: argparse.Namespace, groups: dict[str, list[dict[str, Any]]]) -> None:
    """The first curve of each kind side by side, and how far they lie apart."""
    from rich.table import Table

    curves = {kind: group[0]["losses"] for kind, group in groups.items()}
    steps = min(len(curve) for curve in curves.values())
    every = options.show_every or max(1, steps // 12)
    table = Table("step", *curves)
    for step in sorted({*range(0, steps, every), steps - 1}):
        table.add_row(str(step + 1), *(f"{curve[step]:.4f}" for curve in curves.values()))
    console.print(table)
    names = list(curves)
    for position, first in enumerate(names):
        for second in names[position + 1 :]:
            apart = [abs(a - b) / abs(b) for a, b in zip(curves[first], curves[second], strict=True)]
            console.print(
                f"{first} against {second}: mean relative difference a step {statistics.mean(apart):.3%}, "
                f"largest {max(apart):.3%}"
            )
    for kind, group in groups.items():
        for result in group[1:]:
            if result["losses"] != group[0]["losses"]:
                console.print(f"{kind}: two runs of it differ, by at most {largest_gap(group[0], result):.3%}")


def largest_gap(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(one["losses"], other["losses"], strict=True))


def ratio_row(name: str, ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> list[str]:
    def ratio(value: Any) -> str:
        top, bottom = (statistics.mean(value(result) for result in group) for group in (ours, peer))
        return f"{top / bottom:.2f}" if bottom else "-"

    return [
        name,
        ratio(lambda result: 1 / total_seconds(result)),
        ratio(total_seconds),
        ratio(lambda result: result["step_seconds"]),
        ratio(lambda result: result["memory"]["training"]),
        ratio(lambda result: result["memory"]["process"]),
        ratio(last_loss),
        "",
    ]


def total_seconds(result: dict[str, Any]) -> float:
    return sum(result["seconds"].values())


def last_loss(result: dict[str, Any]) -> float:
    return result["losses"][-1]


def size(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB" if value < 10 * 2**30 else f"{value / 2**30:.1f} GiB"


def machine_line(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{date.today()}, {facts['device']}, {cores} cores, Python {platform.python_version()}, {versions}"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
