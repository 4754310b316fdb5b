"""Time, memory, arithmetic and gradients of a run, measured from within its process."""

import gc
import os
import platform
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from finetune.common.progress import trim_memory

FEW = 9  # steps


class Memory:
    """Peaks of this process: resident on a CPU (Linux), allocated on a GPU. `start`: all weights are loaded."""

    def __init__(self) -> None:
        self.loaded = 0

    def start(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            trim_memory()  # so that what loading has freed is counted when it is taken again
            Path("/proc/self/clear_refs").write_text("5")  # the peak (VmHWM) is now what is resident
        self.loaded = self.peak()

    def peak(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def figures(self) -> dict[str, int]:
        peak = self.peak()
        return {"loaded": self.loaded, "above": peak - self.loaded, "process": peak}


class Clock:
    """Seconds, and CPU seconds of this process and its workers, since it was made."""

    def __init__(self) -> None:
        self.begin, self.cpu = perf_counter(), cpu_seconds()

    def figures(self) -> dict[str, float]:
        return {"seconds": perf_counter() - self.begin, "cpu_seconds": cpu_seconds() - self.cpu}


def cpu_seconds() -> float:
    """Of this process and of its workers that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Watcher(TrainerCallback):
    """The end of each step, and the first step's gradient norms of the named weights."""

    def __init__(self, watched: dict[str, Any]) -> None:
        self.watched = watched
        self.ends: list[tuple[float, float]] = []  # seconds, CPU seconds
        self.norms: dict[str, float] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.norms:
            self.norms = {name: float(weight.grad.float().norm()) for name, weight in self.watched.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append((perf_counter(), cpu_seconds()))

    def check(self, losses: list[float], falls: bool = True) -> None:
        """Raises AssertionError where nothing was learned: of a few steps the losses tell nothing, nor do those of
        rewards, which don't fall.
        """
        assert self.norms and all(norm > 0 for norm in self.norms.values()), f"a gradient is zero: {self.norms}"
        third = max(1, len(losses) // 3)
        first, last = statistics.mean(losses[:third]), statistics.mean(losses[-third:])
        assert not falls or len(losses) < FEW or last < first, f"the loss doesn't fall: {first} -> {last}"

    def figures(self) -> dict[str, float]:
        """Medians over steps; the first, which warms up, isn't among them."""
        gaps = [(a - c, b - d) for (a, b), (c, d) in zip(self.ends[1:], self.ends, strict=False)] or [(0.0, 0.0)]
        seconds, cpu = zip(*gaps, strict=True)
        return {"step_seconds": statistics.median(seconds), "step_cpu_seconds": statistics.median(cpu)}


def matmul_peak() -> float:
    """FLOP/s of a large matrix product in the dtype computed with: the best of several."""
    on_gpu = torch.cuda.is_available()
    side, times, dtype = (8192, 30, torch.bfloat16) if on_gpu else (1024, 20, torch.float32)
    left, right = (torch.randn(side, side, dtype=dtype, device="cuda" if on_gpu else "cpu") for _ in range(2))
    best = float("inf")
    for _ in range(times):
        begin = perf_counter()
        left @ right
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, perf_counter() - begin)
    return 2 * side**3 / best


def sizes(model: Any, encoder: Any) -> dict[str, Any]:
    """Numbers of weights by part, and operations of attention and encoder."""
    config = model.config.text_config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    linear = [p.weight.numel() for parts in model.projectors.values() for p in parts if isinstance(p, nn.Linear)]
    return {
        "frozen": sum(
            part.in_features * part.out_features  # also of 4-bit layers
            for name, part in model.causal_lm.base_model.named_modules()
            if isinstance(part, nn.Linear) and "lora_" not in name
        ),
        "head": config.vocab_size * config.hidden_size,
        "lora": sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name),
        "projector": linear or [0, 0],
        "rows_a_picture": encoder.layout.rows if encoder else 0,
        "attention": config.num_attention_heads * width * config.num_hidden_layers,
        "encoder_flops": encoder_flops(encoder) if encoder else 0,
    }


def encoder_flops(encoder: Any) -> int:
    """Operations of one picture's forward, as torch counts them."""
    from PIL import Image
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder.encode(encoder.prepare(Image.new("RGB", (64, 64))).values[None])
    return counter.get_total_flops()


def needed_flops(facts: dict[str, Any], side: str) -> float:
    """Operations that the training of a side needs: forward, gradients of inputs, and of weights that train. Padding
    and positions that aren't learned have no part in it.
    """
    model, count = facts["model"], facts[side]
    first, second = model["projector"]
    return (
        4.0 * model["frozen"] * count["tokens"]
        + 4.0 * model["head"] * facts["learned_tokens"]
        + 12.0 * model["attention"] * count["pairs"]
        + 6.0 * model["lora"] * count["tokens"]
        + (4.0 * first + 6.0 * second) * model["rows_a_picture"] * count["projected"]
        + float(model["encoder_flops"]) * count["encoded"]
    )


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
