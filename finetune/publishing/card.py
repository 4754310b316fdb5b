"""The card, README.md: huggingface_hub's ModelCard from our template, with all figures from the run's own files."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from finetune.common.certificate import Certificate, comparison
from finetune.evaluation.report import tables, words
from finetune.evaluation.report.content import Content
from finetune.evaluation.report.examples import Album, Example, examples
from finetune.model.bindings import TaskBinding
from finetune.model.heads import HeadSettings
from finetune.publishing.parts import Publication, source_name

TEMPLATE = Path(__file__).with_name("card.md.jinja")
TAGS = {"image": "image-text-to-text", "audio": "audio-text-to-text", "video": "video-text-to-text"}
FILES = {"image": "picture.png", "audio": "recording.wav", "video": "clip.mp4"}
WEBP = "data:image/webp;base64,"
FEW_ROWS = 200  # with fewer held-out rows, intervals are wide


@dataclass(frozen=True)
class CardSample:
    """An example on the card. `pictures`: (path below the card's folder, kind); `others`: media that can't be shown."""

    example: Example
    pictures: list[tuple[str, str]]
    others: list[str]


def write_card(folder: Path, publication: Publication) -> None:
    """Write README.md and samples/ into `folder`."""
    content, recipe = publication.content, publication.recipe
    media = list(recipe.model.encoders) or list(dict.fromkeys(m for source in recipe.data for m in source.task.media))
    chosen = samples(content, folder, recipe.publish.samples)
    card = ModelCard.from_template(
        card_data(publication, pipeline_tag(media, content.bindings.values())),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=content.name,
        merged=publication.merged,
        existing=recipe.model.base is not None,
        media=" and ".join(words.NOUNS[kind][1] for kind in media),
        bases=publication.bases,
        tasks=", ".join(
            name if name == binding.task.kind else f"{name} ({binding.task.kind})"
            for name, binding in content.bindings.items()
        ),
        snippet=snippet(content, publication.repo, chosen),
        scores=score_tables(content),
        conditions=conditions(content),
        certificate=merge_text(content.certificate) if content.certificate else "",
        samples=sample_table(chosen),
        sources=source_table(publication),
        splits={name: split for name, split in content.splits.items() if split.rows},
        stages=stage_table(content),
        components=table(
            ["component", "name", "commit", "options"],
            [[row.role, row.name, row.commit[:12], row.options] for row in tables.components(content)],
        ),
        costs=table(
            ["", "part", "amount"], [[cost.title, *row] for cost in tables.costs(content) for row in cost.rows]
        ),
        versions=", ".join(f"{name} {version}" for name, version in content.versions.items() if name != "processes"),
        stated_limits=recipe.publish.limits,
        predictions=len(content.predictions),
        few_rows=FEW_ROWS,
        tested_on=tested_on(content),
        loss_measured=any("error_nats_per_token" in metrics for metrics in content.metrics.scores.values()),
        licence=publication.licence,
        data_licences=publication.data_licences,
    )
    card.save(folder / "README.md")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """A Markdown table, "" without rows. The last `numbers` columns are aligned right."""
    marks = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    lines = [list(head), marks, *([cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def cell(text: str) -> str:
    """Text without line ends, columns or markup of its own."""
    plain = " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return plain.replace("`", "\\`")


def card_data(publication: Publication, tag: str) -> ModelCardData:
    """The card's metadata. The Hub's words for the relation to a base model are adapter, merge, quantized, finetune."""
    content, options, merged = publication.content, publication.recipe.publish, publication.merged
    main = publication.recipe.model.language_part
    on_hub = [base.name for base in sorted(publication.bases, key=lambda base: base.key != main) if base.name]
    datasets = [str(s.path) for s in publication.recipe.data if s.format is not None and s.format.kind == "hub"]
    heads = {binding.head.kind for binding in content.bindings.values()}
    relation = {"base_model_relation": "merge" if merged else "adapter"} if on_hub else {}
    return ModelCardData(
        base_model=list(dict.fromkeys(on_hub)) or None,
        library_name="finetune",
        pipeline_tag=tag,
        license=publication.licence,
        language=list(options.languages) or None,
        datasets=list(dict.fromkeys([*options.datasets, *datasets])) or None,
        tags=["finetune", "multimodal", *([] if merged else ["peft", "lora"]), *sorted(heads - {"language"})],
        model_name=content.name,
        eval_results=eval_results(content, tag) or None,
        **relation,  # type: ignore[arg-type]
    )


def pipeline_tag(media: Sequence[str], bindings: Iterable[TaskBinding]) -> str:
    """The Hub's name for what the model does."""
    bindings = list(bindings)
    labels = all(binding.head.kind == "label" for binding in bindings) and bool(bindings)
    if len(media) > 1:
        return "any-to-any"
    if not media:
        return "text-classification" if labels else "text-generation"
    if list(media) == ["audio"] and {binding.task.kind for binding in bindings} == {"transcribe"}:
        return "automatic-speech-recognition"
    return f"{media[0]}-classification" if labels else TAGS[media[0]]


def eval_results(content: Content, tag: str) -> list[EvalResult]:
    """Every score of the trained model, for the card's model-index."""
    return [
        EvalResult(
            task_type=tag,
            task_name=task,
            dataset_type=f"{content.name}-{task}",
            dataset_name=f"held-out rows of {task}",
            dataset_split=scored_split(content),
            metric_type=metric,
            metric_name=words.plain(metric),
            metric_value=values["tuned"],
        )
        for task, metrics in content.metrics.scores.items()
        for metric, values in metrics.items()
        if values.get("tuned") is not None
    ]


def score_tables(content: Content) -> list[tuple[str, int, str]]:
    """(task, rows scored, table of its metrics under all conditions)."""
    result = []
    for scores in tables.score_tables(content):
        lines = []
        for row in scores.metrics:
            name = words.plain(row.metric) + (" (lower is better)" if row.lower_is_better else "")
            line = [f"**{name}**" if row.primary else name]
            for condition, score in zip(scores.conditions, row.cells, strict=True):
                interval = f" ({score.interval})" if score and score.interval and condition == "tuned" else ""
                line.append(words.number(score.value) + interval if score else "")
            lines.append(line)
        head = ["", *map(words.plain, scores.conditions)]
        result.append((scores.task, len(content.predictions_of(scores.task)), table(head, lines, len(head) - 1)))
    return result


def conditions(content: Content) -> dict[str, str]:
    """Condition -> what it is."""
    names = dict.fromkeys(name for scores in tables.score_tables(content) for name in scores.conditions)
    return {words.plain(name): words.meaning(name) for name in names if words.meaning(name)}


def source_table(publication: Publication) -> str:
    rows = []
    for row, (_, source) in zip(tables.sources(publication.content), publication.content.sources, strict=True):
        prompt = f"{row.task}: {row.prompt}" if row.prompt else row.task
        licence = publication.data_licences.get(source_name(source)) or ""
        rows.append([row.path, row.split, prompt, row.options, licence])
    return table(["source", "split", "task", "options", "licence"], rows)


def stage_table(content: Content) -> str:
    rows = []
    for row in tables.stages(content):
        result, stage = row.result, row.stage
        figures = [result.steps, result.samples or 0, result.tokens or 0] if result else [0, 0, 0]
        loss = " → ".join(words.number(value) for value in row.loss or ())
        time = words.duration(result.seconds) if result and result.seconds is not None else ""
        numbers = [f"{stage.learning_rate:g}", f"{int(stage.epochs):,}", *(f"{value:,}" for value in figures)]
        rows.append([stage.name, row.weights, *numbers, loss, time])
    return table(
        ["stage", "trains (weights)", "peak rate", "epochs", "steps", "rows seen", "tokens", "loss", "time"], rows, 7
    )


def merge_text(certificate: Certificate) -> str:
    """A paragraph and a table."""
    names, rows = comparison(certificate)
    lead = (
        f"Merged into {certificate.merged_into}: {certificate.why}. Compared with {certificate.reference} on "
        f"{certificate.rows:,} held-out rows, {certificate.positions:,} next tokens."
    )
    return f"{lead}\n\n{table(names, rows, len(names) - 1)}\n"


def samples(content: Content, folder: Path, count: int) -> list[CardSample]:
    """The best and the worst predictions, of all tasks in turn; their pictures are written below `folder`."""
    pool = examples(content.predictions, Album(content.limits)) if count else []
    chosen: list[Example] = []
    for side, most in (("best", count - count // 2), ("worst", count // 2)):
        chosen += sorted((e for e in pool if e.side == side), key=lambda example: example.rank)[:most]
    result = []
    for number, example in enumerate(chosen, 1):
        sample = CardSample(example, [], [])
        for place, medium in enumerate(example.media):
            if not medium.uri.startswith(WEBP):
                sample.others.append(words.NOUNS.get(medium.kind, (medium.kind,))[0])
                continue
            name = f"samples/{number}{f'-{place + 1}' if place else ''}.webp"
            (folder / "samples").mkdir(exist_ok=True)
            (folder / name).write_bytes(base64.b64decode(medium.uri.removeprefix(WEBP)))
            sample.pictures.append((name, medium.kind))
        result.append(sample)
    return result


def sample_table(chosen: Sequence[CardSample]) -> str:
    lines = []
    for sample in chosen:
        example = sample.example
        media = [f"![{kind}]({name})" for name, kind in sample.pictures] + [f"({other})" for other in sample.others]
        answer = (example.answers.get("tuned") or "(none)") + {"right": " ✓", "wrong": " ✗"}.get(example.verdict, "")
        base = example.answers.get("base", "")
        lines.append([example.task, " ".join(media), example.question, example.target, answer, base])
    return table(["task", "media", "question", "target", "answer", "before training"], lines)


def snippet(content: Content, repo: str, chosen: Sequence[CardSample]) -> str:
    """Python that loads the model and asks it one question as it was trained; about a sample's picture if one is
    published.
    """
    first = next((row for row in content.predictions if row.task in content.bindings), None)
    task = first.task if first else next(iter(content.bindings), "")
    settings = content.bindings[task].settings if task else HeadSettings()
    arguments = [repr(first.question if first else "What is this?")]
    if not settings.free_text:
        arguments.append(f"task={task!r}")
    pictures = [sample.pictures[0] for sample in chosen if sample.example.task == task and sample.pictures]
    imports = ["import finetune"]
    for kind in dict.fromkeys(medium.kind for medium in first.media) if first else ():
        value = repr(FILES.get(kind, kind))
        if kind == "image" and pictures and pictures[0][1] == "image":
            value = f'hf_hub_download("{repo}", "{pictures[0][0]}")'
            imports.append("from huggingface_hub import hf_hub_download")
        arguments.append(f"{kind}={value}")
    method = "answer" if settings.free_text else "probabilities" if settings.labels else "number"
    call = f"print(model.{method}({', '.join(arguments)}))"
    return "\n".join([*imports, "", f'model = finetune.load("{repo}")', call])


def scored_split(content: Content) -> str:
    return content.recipe.evaluate.split if content.recipe else "test"


def tested_on(content: Content) -> list[str]:
    """The sources of the evaluated split; all, where it was held out of them."""
    split = scored_split(content)
    rows = tables.sources(content)
    return list(dict.fromkeys([row.path for row in rows if row.split == split] or [row.path for row in rows]))
