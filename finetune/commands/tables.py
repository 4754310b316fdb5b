"""What commands print: results as tables and lines."""

from itertools import pairwise
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from finetune.common.console import plain_console
from finetune.common.errors import escaped
from finetune.data.check.ledger import CODES
from finetune.data.rows import SHOWN, error_list

if TYPE_CHECKING:
    from finetune.commands.data_check import CheckResult
    from finetune.commands.data_pairs import PairsResult
    from finetune.commands.data_preview import Previews
    from finetune.commands.predict import Predictions
    from finetune.commands.run import RunResult
    from finetune.data.describe.run import Descriptions
    from finetune.evaluation.evaluation_result import EvaluationResult
    from finetune.export._contract import ExportResult
    from finetune.publishing.push import Pushed
    from finetune.training.plan.result import Plan
    from finetune.training.sweep import SweepResult


def say(text: object = "") -> None:
    print(escaped(str(text)))


def print_export(result: "ExportResult") -> None:
    say(f"{result.target}: {result.model_class} ({result.reason})")
    say(result.comparison)
    say(result.folder)


def print_push(result: "Pushed") -> None:
    for line in result.checks:
        say(line)
    say(result.url or f"not uploaded; the files are in {result.folder}")


def print_predictions(result: "Predictions") -> None:
    errors = result.errors
    if result.left_out:
        others = ", ".join(path.name for path in result.left_out[:SHOWN])
        more = f" and {len(result.left_out) - SHOWN:,} more" if len(result.left_out) > SHOWN else ""
        say(f"{len(result.left_out):,} other files in the folders were left out: {others}{more}")
    if errors:
        say(
            error_list(
                [f"{row.row}: {row.error}" for row in errors],
                f"{len(errors):,} row{'s' * (len(errors) > 1)} without an answer",
            )
        )
    say(f"{result.out}: {len(result.rows) - len(errors):,} of {len(result.rows):,} rows answered")


def print_descriptions(result: "Descriptions") -> None:
    if result.errors:
        print(
            error_list(result.errors, f"{len(result.errors):,} file{'s' * (len(result.errors) > 1)} without an answer")
        )
    print(result)
    if result.rows:
        print("data:", f"  {result.source}", sep="\n")


def print_pairs(result: "PairsResult") -> None:
    if count := len(result.errors):
        print(error_list(result.errors, f"{count:,} row{'s' * (count > 1)} without a verdict"))
    print(result)


def print_run(result: "RunResult") -> None:
    from finetune.evaluation.report.words import readable

    shown, folder = result.prediction, result.folder
    for medium in shown.media:
        say(f"{medium.kind:<12} {medium.path}")
    for name, text in (("question", shown.question), ("answer", result.answer), ("right", readable(shown.target))):
        say(f"{name:<12} {text}")
    say()
    paths = {name: getattr(folder, name) for name in ("adapter", "metrics", "predictions", "plots", "merged")}
    for name, path in {**paths, "report": result.report}.items():
        say(f"{name:<12} {path}")


def print_plan(result: "Plan") -> None:
    from finetune.common.gpu import GIB
    from finetune.training.plan.cards import SIZES, USABLE
    from finetune.training.plan.result import TIGHT, size

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="memory of the card", title_justify="left")
    table.add_column("", no_wrap=True)
    for phase in result.phases:
        table.add_column(phase.name.replace(" ", "\n", 1), justify="right")
    *parts, together, time = result.rows()
    for row in parts:
        table.add_row(*row)
    table.add_section()
    table.add_row(*together)
    table.add_row(*time)
    console = plain_console()
    console.print(table)
    console.print(f"needs {size(result.needed)} of GPU memory; peak in '{result.fullest.name}', in {result.dtype}")
    for nominal in SIZES:
        change = result.fit(nominal * USABLE)
        verdict = "does not fit"
        if change is not None:
            verdict = "tight" if change.needed > TIGHT * nominal * USABLE * GIB else "fits"
            verdict += f" with {change} ({change.needed / GIB:.1f} GiB)" if change.keys else ""
        console.print(f"  {nominal:>2} GB: {verdict}")
    for what, amounts in (("disk", result.disk), ("later", result.memory_elsewhere)):
        console.print(f"{what}: " + ", ".join(f"{name} {size(amount)}" for name, amount in amounts.items() if amount))
    for note in result.notes:
        console.print(f"({note})", style="dim")
    say(result.line())


def print_trials(result: "SweepResult") -> None:
    from finetune.evaluation.report.headline import figures, verdict_of

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    header, rows = result.table()
    for name in header:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    plain_console().print(table)
    if size := result.sample_size():
        say(size)
    if result.compared:
        certain = "" if verdict_of(result.compared, lower=False) == "yes" else "not certainly "
        difference = figures("accuracy", result.compared)
        say(f"trial {result.best} is {certain}better than trial {result.second}, row by row: {difference}")
    say(f"the best trial's recipe: {result.folder}/best.yaml")


def print_scores(result: "EvaluationResult") -> None:
    """Each task's table, and what it comes to in a sentence."""
    from finetune.evaluation.report.headline import headlines
    from finetune.evaluation.report.tables import score_tables

    content = result.content
    sentences = {headline.task: headline.sentence for headline in headlines(content)}
    for scores in score_tables(content):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
        table.add_column("", no_wrap=True)
        for condition in scores.conditions:
            table.add_column(condition.replace("_", "\n"), justify="right", no_wrap=True)
            if condition == "tuned":
                table.add_column("95% CI", justify="right", min_width=len("0.561–0.683"))
        for row in scores.metrics:
            cells = []
            for condition, score in zip(scores.conditions, row.cells, strict=True):
                cells.append(f"{score.value:.3f}" if score else "")
                if condition == "tuned":
                    cells.append(score.interval if score else "")
            table.add_row(row.metric + " ↓" * row.lower_is_better, *cells)
        lower = "; ↓ lower is better" if any(row.lower_is_better for row in scores.metrics) else ""
        say(f"{scores.task}, n = {scores.rows:,}{lower}")
        plain_console().print(table)
        say(f"{sentences.get(scores.task, '')}\n")


def print_findings(result: "CheckResult") -> None:
    summary = result.summary
    splits = ", ".join(f"{counts['rows']:,} {split}" for split, counts in summary["splits"].items()) or "none usable"
    say(f"{summary['name']}: {summary['rows']:,} rows read ({splits})")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("found", justify="right")
    table.add_column("finding")
    table.add_column("example", style="dim", overflow="fold")
    for code, count in summary["findings"].items():
        severity, title = CODES[code]
        colour = "red" if severity == "error" else "yellow"
        table.add_row(Text(severity, colour), f"{count:,}", title, summary["examples"][code])
    if summary["findings"]:
        plain_console().print(table)
    say(f"{_counted(result.errors, 'error')}, {_counted(result.warnings, 'warning')}: {result.html}, {result.json}")
    if fixed := result.fixed:
        say(f"cleaned: {fixed.rows:,} rows kept, {fixed.quarantined:,} in quarantine: {fixed.recipe}")
        if fixed.quarantined > fixed.rows:
            say(f"more rows were left out than kept: {fixed.recipe.with_name('quarantine.jsonl')} says why")


def print_previews(previews: "Previews") -> None:
    console = plain_console()
    for preview in previews:
        console.print(Text(escaped(f"{preview.where}  {preview.summary}"), "bold"))
        text = Text(escaped(preview.problem), "red")
        for piece in preview.pieces:
            shown = piece.text
            if piece.medium:
                shown = f"[{piece.medium.kind} {piece.text} × {piece.tokens}]"
            elif piece.ends:
                shown = "".join(f"{shown[begin:end]}|" for begin, end in pairwise((0, *piece.ends)))
            text.append(escaped(shown), "cyan" if piece.medium else "bold green" if piece.learned else "")
        console.print(text)
        if preview.answer:
            console.print(Text(escaped(f"expected answer: {preview.answer}"), "dim"))
        console.print()
    console.print(Text.assemble(("green", "bold green"), ": learned; the rest is only read"))


def _counted(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"
