"""The card, README.md: huggingface_hub's ModelCard from a template of ours, all figures from the run's own files."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from finetune.common import certificate as certificates
from finetune.evaluation.report import tables, words
from finetune.evaluation.report.content import Content
from finetune.evaluation.report.examples import Album, Example, examples
from finetune.publishing.parts import Base

TEMPLATE = Path(__file__).with_name("card.md.jinja")
TAGS = {"image": "image-text-to-text", "audio": "audio-text-to-text", "video": "video-text-to-text"}
FEW = 200  # held-out rows; with fewer, figures are coarse


def write_card(
    folder: Path,
    content: Content,
    *,
    repo: str,
    merged: bool,
    bases: Sequence[Base],
    data: Mapping[str, str | None],
    options: Mapping[str, Any],
) -> None:
    """Write README.md and samples/ into `folder`. `content`: the run's, its recipe without names of this machine;
    `data`: {source: licence}; `options`: the recipe's `publish`.
    """
    asks = content.adapter.get("asks", {})
    shown = samples(content, folder, options["samples"])
    tag = pipeline_tag(list(content.recipe["model"]["encoders"]), asks)
    card = ModelCard.from_template(
        card_data(content, tag=tag, merged=merged, bases=bases, options=options),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=content.name,
        merged=merged,
        media=" and ".join(words.KINDS[kind][1] for kind in content.recipe["model"]["encoders"]),
        bases=[(called(base), base.name or base.called, bool(base.name)) for base in bases],
        tasks=", ".join(asked_for(asks)),
        snippet=snippet(content, repo, asks, shown),
        scores=score_tables(content),
        conditions="; ".join(conditions(content)),
        certificate=certificates.markdown(content.certificate) if merged else "",
        samples=sample_table(shown),
        sources=source_table(content, data),
        rows="; ".join(
            f"{split}: {found['rows']:,} rows, {found['media']:,} media"
            for split, found in content.splits.items()
            if found.get("rows")
        ),
        stages=stage_table(content),
        parts=table(["part", "what", "commit", "options"], [[*p[:2], p[2][:12], p[3]] for p in tables.parts(content)]),
        costs=table(["", "part", "how much"], [[t, *line] for t, lines in tables.costs(content) for line in lines]),
        versions=", ".join(f"{name} {version}" for name, version in content.versions.items() if name != "processes"),
        limits=limits(content, options["limits"]),
        license_told=licence_of(bases, options) or "unknown",
        licences=[
            *((called(base), base.licence or "unknown") for base in bases),
            *((s, d or "unknown") for s, d in data.items()),
        ],
    )
    card.save(folder / "README.md")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """Markdown, "" without rows. The last `numbers` columns stand on the right."""
    marks = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    lines = [list(head), marks, *([cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def cell(text: str) -> str:
    """Text as it is: no line ends, no columns, no markup of its own."""
    plain = " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return plain.replace("`", "\\`")


def asked_for(asks: Mapping[str, Any]) -> list[str]:
    kinds = {name: ask["task"]["kind"] for name, ask in asks.items()}
    return [name if name == kind else f"{name} ({kind})" for name, kind in kinds.items()]


def called(base: Base) -> str:
    return "LLM" if base.key == "llm" else f"encoder of {base.key.removeprefix('encoders.')}"


def licence_of(bases: Sequence[Base], options: Mapping[str, Any]) -> str | None:
    return options["license"] or next((base.licence for base in bases if base.key == "llm"), None)


def card_data(
    content: Content, *, tag: str, merged: bool, bases: Sequence[Base], options: Mapping[str, Any]
) -> ModelCardData:
    """The card's metadata. The Hub's words for the relation to a base are adapter, merge, quantized and finetune."""
    on_hub = [base.name for base in bases if base.name and base.key == "llm"]
    on_hub += [base.name for base in bases if base.name and base.key != "llm"]
    relation: dict[str, Any] = {"base_model_relation": "merge" if merged else "adapter"} if on_hub else {}
    from_hub = [source["path"] for _, source in content.sources if (source.get("format") or {}).get("kind") == "hub"]
    heads = {ask["head"]["kind"] for ask in content.adapter.get("asks", {}).values()}
    return ModelCardData(
        base_model=list(dict.fromkeys(on_hub)) or None,
        library_name="finetune",
        pipeline_tag=tag,
        license=licence_of(bases, options),
        language=list(options["languages"]) or None,
        datasets=list(dict.fromkeys([*options["datasets"], *from_hub])) or None,
        tags=["finetune", "multimodal", *([] if merged else ["peft", "lora"]), *sorted(heads - {"language"})],
        model_name=content.name,
        eval_results=eval_results(content, tag) or None,
        **relation,
    )


def pipeline_tag(media: Sequence[str], asks: Mapping[str, Any]) -> str:
    """The Hub's name for what the model does."""
    labels = all(ask["head"]["kind"] == "label" for ask in asks.values()) and bool(asks)
    kinds = {ask["task"]["kind"] for ask in asks.values()}
    if len(media) > 1:
        return "any-to-any"
    if not media:
        return "text-classification" if labels else "text-generation"
    if list(media) == ["audio"] and kinds == {"transcribe"}:
        return "automatic-speech-recognition"
    return f"{media[0]}-classification" if labels else TAGS[media[0]]


def eval_results(content: Content, tag: str) -> list[EvalResult]:
    """Every score of the trained model, for the card's model-index."""
    splits = {name: source.get("split", "test") for name, source in content.sources}
    return [
        EvalResult(
            task_type=tag,
            task_name=task,
            dataset_type=f"{content.name}-{task}",
            dataset_name=f"held-out rows of {task}",
            dataset_split=splits.get(task, "test"),
            metric_type=metric,
            metric_name=words.plain(metric),
            metric_value=values["tuned"],
        )
        for task, metrics in content.metrics["scores"].items()
        for metric, values in metrics.items()
        if values.get("tuned") is not None
    ]


def score_tables(content: Content) -> list[tuple[str, int, str]]:
    """Of each task its name, the rows scored, and its metrics under all conditions."""
    found = []
    for scored in tables.score_tables(content):
        lines = []
        for row in scored["rows"]:
            name = words.plain(row["metric"]) + (" (less is better)" if row["less"] else "")
            cells = [f"**{name}**" if row["primary"] else name]
            for condition, (value, low, high) in zip(scored["conditions"], row["cells"], strict=True):
                margin = (
                    f" ({words.number(low)} to {words.number(high)})"
                    if condition == "tuned" and low is not None
                    else ""
                )
                cells.append("" if value is None else words.number(value) + margin)
            lines.append(cells)
        rows = sum(row.get("task") == scored["task"] for row in content.predictions)
        head = ["", *map(words.plain, scored["conditions"])]
        found.append((scored["task"], rows, table(head, lines, len(head) - 1)))
    return found


def conditions(content: Content) -> list[str]:
    names = dict.fromkeys(name for scored in tables.score_tables(content) for name in scored["conditions"])
    return [f"*{words.plain(name)}*: {words.meaning(name)}" for name in names if words.meaning(name)]


def source_table(content: Content, data: Mapping[str, str | None]) -> str:
    rows = []
    for source in tables.sources(content):
        asked = f"{source['task']}: {source['prompt']}" if source["prompt"] else source["task"]
        rows.append([source["path"], source["split"], asked, source["told"], data.get(source["path"]) or ""])
    return table(["source", "for", "asked", "options", "licence"], rows)


def stage_table(content: Content) -> str:
    rows = []
    for stage in tables.stages(content):
        weights = ", ".join(f"{part} ({count:,})" if count else part for part, count in stage["weights"].items())
        figures = [f"{stage.get(key, 0):,}" for key in ("epochs", "steps", "samples", "tokens")]
        loss = " → ".join(words.number(value) for value in stage["loss"])
        time = words.duration(stage["seconds"]) if "seconds" in stage else ""
        rows.append([stage["name"], weights, f"{stage['learning_rate']:g}", *figures, loss, time])
    return table(
        ["stage", "trains (weights)", "peak rate", "epochs", "steps", "rows seen", "tokens", "loss", "time"], rows, 7
    )


def samples(content: Content, folder: Path, count: int) -> list[dict[str, Any]]:
    """The worst and the best predictions, in turn over the tasks, each {example, pictures: paths below `folder`, which
    are written, others: what can't be shown}.
    """
    found = examples(content.predictions, Album(content.limits)) if count else []
    chosen: list[Example] = []
    for side in ("best", "worst"):
        own = sorted((e for e in found if e.side == side), key=lambda example: example.rank)
        chosen += own[: count - count // 2 if side == "best" else count // 2]
    shown = []
    for number, example in enumerate(chosen, 1):
        pictures, others = [], []
        for place, medium in enumerate(example.media):
            if not medium.uri.startswith("data:image/webp;base64,"):
                others.append(words.KINDS.get(medium.kind, (medium.kind,))[0])
                continue
            name = f"samples/{number}{f'-{place + 1}' if place else ''}.webp"
            (folder / "samples").mkdir(exist_ok=True)
            (folder / name).write_bytes(base64.b64decode(medium.uri.partition(",")[2]))
            pictures.append((name, medium.kind))
        shown.append({"example": example, "pictures": pictures, "others": others})
    return shown


def sample_table(shown: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for sample in shown:
        example, answers = sample["example"], dict(sample["example"].answers)
        seen = " ".join(
            [*(f"![{kind}]({name})" for name, kind in sample["pictures"]), *(f"({o})" for o in sample["others"])]
        )
        verdict = {"fits": " ✓", "wrong": " ✗"}.get(example.verdict, "")
        said = f"{answers.get('tuned', '')}{verdict}"
        lines.append([example.task, seen, example.question, example.target, said, answers.get("base", "")])
    return table(["task", "shown", "question", "right", "answered", "before training"], lines)


def snippet(content: Content, repo: str, asks: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> str:
    """Python that loads the model and asks it one question as it was trained; about a sample picture where one is
    published.
    """
    first = next((row for row in content.predictions if row.get("task") in asks), {})
    task = first.get("task") or next(iter(asks), "")
    settings = asks.get(task, {}).get("settings", {})
    lines = ["import finetune", f'model = finetune.load("{repo}")']
    given = [repr(str(first.get("question", "What is this?")))]
    if settings:
        given.append(f"task={task!r}")
    sample = next((s for s in shown if s["example"].task == task and s["pictures"]), None)
    for kind in dict.fromkeys(first.get("kinds", [])):
        file = {"image": "picture.png", "audio": "recording.wav", "video": "clip.mp4"}.get(kind, kind)
        value = repr(file)
        if kind == "image" and sample is not None and sample["pictures"][0][1] == "image":
            value = f'hf_hub_download("{repo}", "{sample["pictures"][0][0]}")'
            lines.insert(1, "from huggingface_hub import hf_hub_download\n")
        given.append(f"{kind}={value}")
    if lines[1].startswith("model"):
        lines.insert(1, "")
    verb = "probabilities" if "labels" in settings else "number" if settings else "answer"
    return "\n".join([*lines, f"print(model.{verb}({', '.join(given)}))"])


def limits(content: Content, own: str) -> list[str]:
    """What the figures don't tell, in sentences."""
    count = len(content.predictions)
    told = [own] if own else []
    split = content.recipe.get("evaluate", {}).get("split", "test")
    rows = tables.sources(content)
    tested = [row["path"] for row in rows if row["split"] == split] or [row["path"] for row in rows]
    names = ", ".join(dict.fromkeys(tested))
    told.append(f"It was tested on {count:,} held-out rows of its own sources ({names}), and on nothing else.")
    if count < FEW:
        told.append("So few rows leave wide margins: see the intervals in the tables.")
    texts = any("error_nats_per_token" in metrics for metrics in content.metrics.get("scores", {}).values())
    if not texts:
        told.append("How much of what the LLM knew of language it has kept wasn't measured.")
    told.append("It wasn't tested for bias, for safety, or in languages other than those of its rows.")
    return told
