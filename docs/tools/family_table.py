"""Writes the table of docs/existing-models.md and existing-models.zh.md: what works with each family of models,
tried on random models of two layers.

    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python docs/tools/family_table.py [--engines] [FAMILY ...]

Families named are measured anew, the others' rows stay; without names all are. Takes minutes on a CPU. Families whose
processor needs a package that isn't installed keep their rows. The variables FINETUNE_VLLM and FINETUNE_LLAMA_CPP name
the engines, as for tests/engines; without them the cells of vLLM and GGUF stay as they are; with --engines, all others.
The pages are written after each family.
"""

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import torch  # noqa: E402
from families import ZOO  # noqa: E402
from families.family import write_family  # noqa: E402
from families.recipes import base_recipe  # noqa: E402

import finetune  # noqa: E402
from finetune.common.errors import ExportRefused, FinetuneError  # noqa: E402

PAGES = {"en": ROOT / "docs" / "existing-models.md", "zh": ROOT / "docs" / "existing-models.zh.md"}
NAMES = {
    "llava": "LLaVA 1.5",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "internvl": "InternVL",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "gemma3": "Gemma 3",
    "paligemma": "PaliGemma",
    "pixtral": "Pixtral",
    "mistral3": "Mistral 3",
    "phi4_multimodal": "Phi-4-multimodal",
    "minicpm_v": "MiniCPM-V 4.6",
    "qwen2_audio": "Qwen2-Audio",
    "voxtral": "Voxtral",
    "ultravox": "Ultravox",
    "audioflamingo3": "Audio Flamingo 3",
    "granite_speech": "Granite Speech",
    "qwen2_5_omni": "Qwen2.5-Omni",
}
COLUMNS = ("medium", "train", "nf4", "packed", "cached", "prefix shared", "merge", "vLLM", "GGUF")
CHINESE = {
    "family": "模型系列",
    "medium": "媒体",
    "train": "训练",
    "packed": "打包",
    "cached": "缓存",
    "prefix shared": "共享前缀",
    "merge": "合并",
    "yes": "可以",
    "no": "不可以",
    "refused": "拒绝",
    "not tried": "未试",
    "image": "图片",
    "audio": "音频",
}
NOT_TRIED = "not tried"
LLAMA_CPP_WINDOW = 112  # pixels, of Qwen2.5-VL's attention, whatever the config says
# Columns, by the variable that names the engine: target of `finetune export` and its options.
ENGINES = {
    "FINETUNE_VLLM": ("vllm", ()),
    "FINETUNE_LLAMA_CPP": ("gguf", ("quantization=F32",)),
}


@dataclass(frozen=True)
class Measured:
    """Cells of one family with one medium, in the order of COLUMNS."""

    family: str
    cells: tuple[str, ...]

    @property
    def row(self) -> str:
        return f"| {NAMES[self.family]} | {' | '.join(self.cells)} |"


def measure(name: str, medium: str, folder: Path, before: list[str], engines_only: bool) -> Measured:
    """Train in 16 or 32 and in 4 bits, with features cached and not, merge, and export. `before`: the cells as they
    were.
    """
    family = ZOO[name]
    if name == "qwen2_5_vl":
        vision = {**family.config["vision_config"], "window_size": LLAMA_CPP_WINDOW}
        family = replace(family, config={**family.config, "vision_config": vision}, seed=1)  # 0 has near ties
    recipe = base_recipe(folder, family, write_family(family, folder / "base"), medium)
    try:
        cached = trained(recipe, folder / "cached", "train.cache=true")
    except FinetuneError:
        return Measured(name, (medium, "refused", *["–"] * (len(COLUMNS) - 2)))
    certificate = finetune.merge(cached)
    first = len(COLUMNS) - 1 - len(ENGINES)
    cells = tuple(before[:first]) if engines_only else measured_here(recipe, folder, cached, certificate)
    if os.environ.keys() & ENGINES:
        finetune.evaluate(cached)  # the engines are asked what it asks
    engines = before[first:]
    for place, (variable, (target, options)) in enumerate(ENGINES.items()):
        if variable in os.environ:
            engines[place] = answered_alike(cached, target, options)
    return Measured(name, (medium, *cells, *engines))


def measured_here(recipe: Path, folder: Path, cached: finetune.RunFolder, certificate: Any) -> tuple[str, ...]:
    """The cells that need no engine."""
    plain = trained(recipe, folder / "plain", "train.cache=false")
    four_bits = trained(recipe, folder / "nf4", "model.base.quantize=nf4")
    kind = plain.read_metrics()["train"]["row_kind"]
    return (
        learned(losses(plain)),
        learned(losses(four_bits)),
        yes(kind != "padded"),
        yes(torch.allclose(torch.tensor(losses(plain)), torch.tensor(losses(cached)), rtol=1e-5)),
        yes(kind == "shared"),
        yes(certificate.saved.agreement == 1),
    )


def answered_alike(run: finetune.RunFolder, target: str, options: tuple[str, ...]) -> str:
    """Whether the engine begins each answer to the held-out questions like the merged model, whose answers differ."""
    try:
        result = finetune.export_run(run.path, target, options=["min_equal=0", *options])
    except ExportRefused as error:
        print(f"{target}: {error}", file=sys.stderr)
        return "refused"
    if (found := result.verification) is None:
        raise SystemExit(f"{target}: {result.not_verified}")
    print(found, file=sys.stderr)
    return yes(found.equal_first_tokens == found.rows and found.different > 1)


def trained(recipe: Path, run: Path, *changes: str) -> finetune.RunFolder:
    return finetune.train(finetune.load_recipe(recipe, list(changes)), run)


def losses(run: finetune.RunFolder) -> list[float]:
    found: list[float] = run.read_metrics()["train"]["stages"]["tune"]["losses"]
    return found


def learned(values: list[float]) -> str:
    return yes(values[-1] < values[0])


def yes(right: Any) -> str:
    return "yes" if right else "no"


def table(rows: list[str], language: str) -> str:
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS), *rows]
    if language == "zh":
        cell = re.compile(r"(?<=\| )(" + "|".join(map(re.escape, CHINESE)) + r")(?= \|)")
        lines = [cell.sub(lambda found: CHINESE[found[0]], line) for line in lines]
    return "\n".join(lines)


def between(text: str) -> re.Match[str]:
    """What stands between the markers of the table. Raises ValueError."""
    found = re.search(r"(?<=<!-- families -->\n).*?(?=\n<!-- /families -->)", text, re.DOTALL)
    if found is None:
        raise ValueError("no markers <!-- families --> and <!-- /families -->")
    return found


def written_rows() -> list[str]:
    """Rows of the English page's table."""
    return between(PAGES["en"].read_text(encoding="utf-8"))[0].splitlines()[2:]


def write(rows: list[str]) -> None:
    for language, page in PAGES.items():
        text = page.read_text(encoding="utf-8")
        found = between(text)
        page.write_text(text[: found.start()] + table(rows, language) + text[found.end() :], encoding="utf-8")


def main(names: list[str], engines_only: bool) -> None:
    rows: dict[str, list[str]] = {}
    cells: dict[tuple[str, str], list[str]] = {}
    for row in written_rows():
        family, medium, *others = row.strip("| ").split(" | ")
        rows.setdefault(family, []).append(row)
        cells[family, medium] = others
    for name in names or NAMES:
        if ZOO[name].missing:
            print(f"{name}: not measured: {', '.join(ZOO[name].missing)} missing", file=sys.stderr)
            continue
        found = []
        for medium in ZOO[name].media:
            if medium == "video":  # needs torchvision
                continue
            before = cells.get((NAMES[name], medium), [NOT_TRIED] * (len(COLUMNS) - 1))
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                found.append(measure(name, medium, Path(folder), before, engines_only).row)
            print(json.dumps(found[-1]), file=sys.stderr)
        rows[NAMES[name]] = found
        write([row for name in NAMES.values() for row in rows.get(name, ())])


if __name__ == "__main__":
    main([name for name in sys.argv[1:] if name != "--engines"], "--engines" in sys.argv)
