"""Writes docs/support.md and support.zh.md: which parts and options combine, tried on random models a few layers deep.

    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python docs/tools/support.py [--check]

With --check it writes nothing, and fails where the page would change. A combination counts as supported if a recipe
with it trains, and where the table says so merges or exports. What is refused is shown with the program's own reason.
Takes minutes on a CPU.
"""

import contextlib
import csv
import io
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import av  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402
from tiny import COLOURS, FAMILIES, tiny_llm, tiny_picture, tiny_recipe  # noqa: E402
from tiny_encoders import KINDS, medium_of, tiny_encoder_folder, tiny_encoder_of, tiny_medium, tiny_sound  # noqa: E402

import finetune  # noqa: E402
from finetune.common.errors import FinetuneError, Interrupted  # noqa: E402
from finetune.common.registry import part_names  # noqa: E402
from finetune.model.row_layout import RowKind, row_kind  # noqa: E402
from finetune.recipe.parts import ProjectorPart  # noqa: E402

PAGE = ROOT / "docs" / "support.md"
CHINESE_PAGE = ROOT / "docs" / "support.zh.md"
BEGINNING = """# Support matrix

<!-- Written by docs/tools/support.py, which tries each combination. -->
"""
INTRODUCTION = """What combines with what. Each cell was tried on random models a few layers deep, on a CPU, by
`python docs/tools/support.py`: *yes* means that a recipe with this combination trained, and merged or exported where
the table says so. A number stands for a refusal, when the recipe is read or when the run begins, or for a fault of a
library; its words are below the table."""
TEXT_OF_HEADS = "Trained; with `distill` the LLM imitates its own answers to transcripts."
TEXT_OF_EXPORTS = """\
Merged over a Llama, then exported. The cell names what was written; whether the engine answers alike is
compared by `finetune export` itself, where the engine is installed. For `gguf` see [Export](export.md#gguf)."""
TEXT_OF_PACKING = (
    "Samples are packed into rows without padding, and what they begin with is computed once, where the LLM gives "
    "each exactly what it has alone; each run tries it."
)
CHINESE = {  # headings and paragraphs
    "# Support matrix": "# 支持矩阵",
    INTRODUCTION: "哪些功能可以组合。每一格都由 `python docs/tools/support.py` 在 CPU 上用只有几层的随机模型试过："
    "*可以*表示使用这一组合的配方完成了训练；表格注明合并或导出时，也完成了合并或导出。数字表示读取配方时或运行开始时被拒绝，或某个库"
    "出错；表格下方是程序或库的原话。",
    "## Frozen weights and LoRA": "## 冻结的权重与 LoRA",
    "Trained and merged.": "试过训练和合并。",
    "## Fusion and encoders": "## 融合与编码器",
    "Trained.": "试过训练。",
    "## Projectors and encoders": "## 投影层与编码器",
    "Features of a medium projected.": "试过投影一个媒体的特征。",
    "## Heads and objectives": "## 头与训练目标",
    TEXT_OF_HEADS: "试过训练；使用 `distill` 时，语言模型模仿自己对转写文本的回答。",
    "## Training options": "## 训练选项",
    "## Exports": "## 导出",
    TEXT_OF_EXPORTS: "试过在一个 Llama 上合并，然后导出。格中是写出的类；目标引擎的回答是否一致，由 `finetune export` "
    "在装有该引擎时自行比对。`gguf` 见[导出](export.zh.md#gguf)。",
    "## Packing": "## 打包",
    TEXT_OF_PACKING: "样本打包成行，没有填充，共有的开头只计算一次，前提是语言模型对每个样本给出的结果与单独处理时完全"
    "相同；每次运行都会检验这一点。",
}
CHINESE_CELLS = {  # and names in the list of families
    "yes": "可以",
    "`vision`, convolutions": "`vision`，卷积网络",
    "head": "头",
    "`prefix`, next token": "`prefix`，下一词元",
    "`prefix`, `distill`": "`prefix`，`distill`",
    "`cross_attention`, next token": "`cross_attention`，下一词元",
    "`cross_attention`, `distill`": "`cross_attention`，`distill`",
    "features cached": "缓存特征",
    "features not cached": "不缓存特征",
    "encoder with LoRA": "编码器加 LoRA",
    "encoder's last layers": "编码器的最后几层",
    "encoder with LoRA, features cached": "编码器加 LoRA，缓存特征",
    "activation checkpoints": "激活检查点",
    "2 accumulated rows": "累积 2 行",
    "validation": "验证",
    "model": "模型",
    "vllm, `adapter=true`": "vllm，`adapter=true`",
    "one picture encoder, `mlp`": "单个图片编码器，`mlp`",
    "one picture encoder, `pixel_shuffle`": "单个图片编码器，`pixel_shuffle`",
    "speech, `stack`": "语音，`stack`",
    "video": "视频",
    "head `label`": "`label` 头",
    "a PEFT adapter (LORA)": "PEFT 适配器（LORA）",
    "packed, prefixes shared": "打包，共享前缀",
    "packed": "打包",
    "packed, under a mask": "打包，使用掩码",
    "padded": "填充",
}
ENCODERS = {  # column: (label of the tiny encoder, projector that takes it)
    "`vision`": ("siglip", {"kind": "pixel_shuffle"}),
    "`vision`, convolutions": ("mobilenet_v2", {"kind": "mlp"}),
    "`whisper`": ("whisper", {"kind": "stack", "factor": 4}),
    "`wave`": ("wav2vec2", {"kind": "stack", "factor": 4}),
    "`spectrogram`": ("ast", {"kind": "resampler", "queries": 4, "width": 16, "heads": 2}),
    "`video`": ("siglip_frames", {"kind": "mlp"}),
    "`video_transformer`": ("videomae", {"kind": "mlp"}),
}
FUSIONS: dict[str, dict[str, Any]] = {
    "prefix": {"kind": "prefix"},
    "cross_attention": {"kind": "cross_attention", "every": 1, "heads": 2, "head_width": 8},
}
PROJECTORS: dict[str, dict[str, Any]] = {"resampler": {"queries": 4, "width": 16, "heads": 2}, "stack": {"factor": 4}}
LORA: dict[str, dict[str, Any] | None] = {
    "LoRA": {},
    "rsLoRA": {"rslora": True},
    "DoRA": {"dora": True},
    "PiSSA": {"initialization": "pissa"},
    "OLoRA": {"initialization": "olora"},
    "none": None,
}
HEADS: dict[str, dict[str, Any]] = {
    "language": {"task": "classify"},
    "language, answers: labels": {"task": "classify", "head": {"kind": "language", "answers": "labels"}},
    "label": {"task": "classify", "head": "label"},
    "score, squared": {"task": {"kind": "score", "number": "mark"}, "head": "score"},
    "score, logistic": {"task": {"kind": "score", "number": "clicked"}, "head": {"kind": "score", "loss": "logistic"}},
    "score, pairwise": {
        "task": {"kind": "rank", "media": ["image"], "text": [], "group": "user", "relevance": "clicked"},
        "head": {"kind": "score", "loss": "pairwise"},
    },
}
ENCODER_LORA = {"tune_encoders": {"image": {"rank": 2}}, "train__cache": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "features cached": {},
    "features not cached": {"train__cache": False},
    "encoder with LoRA": ENCODER_LORA,
    "encoder's last layers": ENCODER_LORA | {"tune_encoders": {"image": {"last_layers": 1}}},
    "encoder with LoRA, features cached": ENCODER_LORA | {"train__cache": True},
    "activation checkpoints": {"train__checkpoint_every_n_layers": 1},
    "2 accumulated rows": {"train__accumulate": 2},
    "validation": {"train__validation": {"every_n_steps": 2}, "data__0__hold_out_validation": 0.3},
}


class Trials:
    """A project of tiny parts and rows, in which recipes are tried; refusals are numbered table by table."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number, self.reasons = folder, 0, []
        self.rows = {split: write_rows(folder / "rows", split, count) for split, count in (("train", 8), ("test", 4))}

    def recipe(self, source: dict[str, Any], changes: dict[str, Any]) -> Path:
        data = [{"path": str(path), "split": split, **source} for split, path in self.rows.items()]
        stage = changes.pop("stage", {})
        trains = ["projectors", "adapter"] if changes.get("adapter", {}) is not None else ["projectors"]
        trains += ["fusion"] if changes.get("model__fusion", {}).get("kind") == "cross_attention" else []
        trains += ["heads"] if source.get("head") not in (None, "language") and "answers" not in str(source) else []
        trains += ["encoders"] if "tune_encoders" in changes else []
        data[0]["hold_out_validation"] = changes.pop("data__0__hold_out_validation", 0.0)
        stages = [{"name": "tune", "trains": trains, "learning_rate": 5.0e-3, **stage}]
        settings = {"train__stages": stages, "train__tokens_per_batch": 512, "evaluate": {"max_new_tokens": 2}}
        return tiny_recipe(self.folder, **{"data": data, **settings, "merge": {"rows": 2, "rows_scored": 0}, **changes})

    def run(self, source: dict[str, Any], changes: dict[str, Any]) -> Path:
        self.number += 1
        torch.manual_seed(0)
        recipe = finetune.load_recipe(self.recipe(source, {**changes}))
        return finetune.train(recipe, self.folder / "runs" / str(self.number)).path

    def cell(self, source: dict[str, Any], changes: dict[str, Any], *then: str) -> str:
        """'yes', or the number of the refusal; `then`: merge."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                run = self.run(source, changes)
                if "merge" in then:
                    finetune.merge(run)
        except Interrupted:
            raise
        except FinetuneError as error:
            return self.refusal(str(error))
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:  # of a library: nobody has foreseen it
            traceback.print_exc()
            return self.refusal(f"fails on a CPU, in a library: {type(error).__name__}: {error}")
        return "yes"

    def exports(self, source: dict[str, Any], changes: dict[str, Any], targets: dict[str, list[str]]) -> list[str]:
        """The row of a model that is trained and merged: what each target makes of it."""
        with contextlib.redirect_stdout(io.StringIO()):
            run = self.run(source, changes)
            finetune.merge(run)
        return [exported(self, run, target.partition(",")[0], given) for target, given in targets.items()]

    def refusal(self, message: str) -> str:
        text = " ".join(re.sub(r"\S*recipe\.yaml(:\d+)*:? ?|\S*/runs/\d+/\w+: ", "", message).split())
        text = re.sub(r"\d+ rows aren't", "these rows aren't", text)
        if text not in self.reasons:
            self.reasons.append(text)
        return f"[{self.reasons.index(text) + 1}]"

    def footnotes(self) -> list[str]:
        lines = [f"{number}. {reason}" for number, reason in enumerate(self.reasons, 1)]
        self.reasons = []
        return ["", *lines] if lines else []


def write_rows(folder: Path, split: str, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(count):
        word, (red, green, blue) = list(COLOURS.items())[number % len(COLOURS)]
        colour = (red, green, min(255, blue + number + 20 * (split == "test")))
        name = f"{split}{number}"
        tiny_picture(colour).save(folder / f"{name}.png")
        soundfile.write(folder / f"{name}.wav", tiny_sound(0.6, seed=number + 20 * (split == "test")), 16_000)
        write_video(folder / f"{name}.mp4", colour)
        media = {"image": f"{name}.png", "audio": f"{name}.wav", "video": f"{name}.mp4"}
        answers = {"label": word, "mark": number % 4, "clicked": number % 2, "user": f"{split}{number // 4}"}
        rows.append(media | answers | {"transcript": f"a {word} square"})
    path = folder / f"{split}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_video(path: Path, colour: tuple[int, int, int]) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_image(tiny_picture(colour, (32, 32)))))
        container.mux(stream.encode())


def table(corner: str, columns: list[str], rows: dict[str, list[str]]) -> list[str]:
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]


def parts_of(trials: Trials, label: str, projector: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A source and changes of the recipe for one encoder."""
    folder, medium = trials.folder / label, medium_of(label)
    if not folder.exists():
        tiny_encoder_folder(folder, label)
    encoder = {"kind": KINDS[label][0], "name": str(folder)}
    encoder |= {"frames": 4} if medium == "video" else {}
    changes = {"model__encoders": {medium: encoder}, "model__projectors": {medium: projector}}
    return {"task": {"kind": "classify", "media": [medium]}}, changes


def weights(trials: Trials) -> list[str]:
    llm = str(trials.folder / "llm")
    rows = {
        f"`quantize: {quantize}`": [
            trials.cell(
                {"task": "classify"},
                {
                    "model__llm": {"name": llm, "quantize": quantize},
                    "adapter": None if lora is None else {"rank": 4, **lora},
                },
                "merge",
            )
            for lora in LORA.values()
        ]
        for quantize in ("nf4", "int8", "none")
    }
    columns = [name if name != "none" else "`adapter: null`" for name in LORA]
    return ["", "## Frozen weights and LoRA", "", "Trained and merged.", "", *table("", columns, rows)]


def encoders(trials: Trials) -> list[str]:
    rows = {}
    for fusion, options in FUSIONS.items():
        cells = []
        for label, projector in ENCODERS.values():
            source, changes = parts_of(trials, label, projector)
            cells.append(trials.cell(source, {**changes, "model__fusion": options}))
        rows[f"`{fusion}`"] = cells
    return ["", "## Fusion and encoders", "", "Trained.", "", *table("", list(ENCODERS), rows)]


def projectors(trials: Trials) -> list[str]:
    rows = {}
    for name in part_names("projectors"):
        projector = ProjectorPart.of(name, **PROJECTORS.get(name, {}))
        rows[f"`{name}`"] = [projected(trials, label, projector) for label, _ in ENCODERS.values()]
    return [
        "",
        "## Projectors and encoders",
        "",
        "Features of a medium projected.",
        "",
        *table("", list(ENCODERS), rows),
    ]


def projected(trials: Trials, label: str, projector: ProjectorPart) -> str:
    encoder = tiny_encoder_of(label)
    with torch.no_grad():
        features = encoder.encode(encoder.prepare(tiny_medium(label)).values[None]).flatten(0, 1)
        try:
            expected = projector.length(features.shape[1])
            assert projector.build(encoder.width, 64)(features).shape[1:] == (expected, 64)
        except FinetuneError as error:
            return trials.refusal(str(error))
    return "yes"


def heads(trials: Trials) -> list[str]:
    distill = {"stage": {"objective": {"kind": "distill", "max_new_tokens": 2}}}
    kinds = {"next token": {}, "`distill`": distill}
    rows = {}
    for head, source in HEADS.items():
        task = {"kind": source["task"]} if isinstance(source["task"], str) else source["task"]
        source = {**source, "task": {**task, "transcript": "transcript"}}
        rows[f"`{head}`"] = [
            trials.cell(source, {"model__fusion": options, **kind})
            for options in FUSIONS.values()
            for kind in kinds.values()
        ]
    columns = [f"`{fusion}`, {kind}" for fusion in FUSIONS for kind in kinds]
    return ["", "## Heads and objectives", "", TEXT_OF_HEADS, "", *table("head", columns, rows)]


def options(trials: Trials) -> list[str]:
    rows = {
        name: [trials.cell({"task": "classify"}, {"model__fusion": fusion, **changes}) for fusion in FUSIONS.values()]
        for name, changes in OPTIONS.items()
    }
    return ["", "## Training options", "", "Trained.", "", *table("", [f"`{name}`" for name in FUSIONS], rows)]


def packing() -> list[str]:
    kept: dict[RowKind, list[str]] = {}
    for family in FAMILIES:
        torch.manual_seed(0)
        kept.setdefault(row_kind(tiny_llm(family)), []).append(f"`{family}`")
    names = {
        RowKind.SHARED: "packed, prefixes shared",
        RowKind.SEGMENTS: "packed",
        RowKind.PACKED: "packed, under a mask",
    }
    lines = [f"- {names.get(kind, kind)}: {', '.join(families)}" for kind, families in kept.items()]
    return ["", "## Packing", "", TEXT_OF_PACKING, "", *lines]


def exports(trials: Trials) -> list[str]:
    models: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for name, label, projector in (
        ("one picture encoder, `mlp`", "siglip", {"kind": "mlp"}),
        ("one picture encoder, `pixel_shuffle`", "siglip", {"kind": "pixel_shuffle"}),
        ("speech, `stack`", "whisper", {"kind": "stack", "factor": 4}),
        ("video", "siglip_frames", {"kind": "mlp"}),
    ):
        models[name] = parts_of(trials, label, projector)
    picture = models["one picture encoder, `mlp`"]
    models["`cross_attention`"] = (picture[0], {**picture[1], "model__fusion": FUSIONS["cross_attention"]})
    models["head `label`"] = (HEADS["label"], picture[1])
    models["DoRA"] = (picture[0], {**picture[1], "adapter": {"rank": 4, "dora": True}})
    targets = {"transformers": [], "vllm": [], "vllm, `adapter=true`": ["adapter=true"], "adapter": []}
    rows = {name: trials.exports(*model, targets) for name, model in models.items()}
    return ["", "## Exports", "", TEXT_OF_EXPORTS, "", *table("model", list(targets), rows)]


def exported(trials: Trials, run: Path, target: str, options: list[str]) -> str:
    out = run / "exported"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result = finetune.export_run(run, target, out, options, verify=False)
    except FinetuneError as error:
        return trials.refusal(str(error))
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return f"`{result.model_class}`" if result.model_class.isidentifier() else result.model_class


def page(begin: Callable[[Path], Trials] = Trials) -> str:
    with tempfile.TemporaryDirectory() as folder:
        trials = begin(Path(folder))
        tiny_recipe(trials.folder)
        lines = [BEGINNING, INTRODUCTION]
        for chapter in (weights, encoders, projectors, heads, options, exports):
            lines += chapter(trials) + trials.footnotes()
        return "\n".join([*lines, *packing()]) + "\n"


def chinese(english: str) -> str:
    """The page in Chinese; refusals stay in the program's words. Raises KeyError for a text without a translation."""
    blocks = []
    for block in english.rstrip().split("\n\n"):
        if block.startswith("|"):
            blocks.append(re.sub(r"(?<=\| )[^|]+?(?= \|)", lambda cell: CHINESE_CELLS.get(cell[0], cell[0]), block))
        elif block.startswith("- "):
            block = re.sub(r"(?<=^- )(.+?): ", lambda name: f"{CHINESE_CELLS[name[1]]}：", block, flags=re.M)
            blocks.append(block.replace(", ", "、"))
        else:
            blocks.append(block if block.startswith(("<!--", "1. ")) else CHINESE[block])
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    written = page()
    if sys.argv[1:] == ["--check"]:
        sys.exit(written != PAGE.read_text(encoding="utf-8") and f"{PAGE}: it has changed; run python {__file__}")
    PAGE.write_text(written, encoding="utf-8")
    CHINESE_PAGE.write_text(chinese(written), encoding="utf-8")
