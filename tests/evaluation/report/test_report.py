"""The page of a run: whole and true where the run is, honest where it isn't, harmless whatever the data hold."""

import base64
import hashlib
import io
import json
import random
import re
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import PIL.Image
import pytest
import soundfile
import yaml
from hostile_run import EVIL, spoil_run, stage_of
from html_page import Page
from trained_runs import change_json, copy_of, predictions_of, write_predictions

from finetune.common.errors import ArtifactError
from finetune.evaluation.report.report import report

EMBEDDED = ("data:image/webp;base64,", "data:image/png;base64,", "data:audio/ogg;base64,")


def pictures(page: Page) -> list[dict]:
    """Thumbnails, without the charts."""
    return [image for image in page.of("img") if image.get("class") != "plot"]


pytestmark = pytest.mark.slow  # its run takes long


@pytest.fixture(scope="module")
def finished(finished_run, tmp_path_factory):
    """(run, page) of pictures and sounds with labels; where figures depend on the machine, with some that are known."""
    run = copy_of(finished_run("media"), tmp_path_factory.mktemp("report"))
    change_json(
        run / "metrics.json",
        seconds={"decode": 4.2, "encode": 61.9, "llm": 151.2, "train": 223.0, "evaluate": 7345.0},
        peak_memory_bytes={"train_cpu": 1395864371, "evaluate_cpu": 1258291200},
        energy_joules={"train_cpu": 15432.1},
    )
    change_json(run / "versions.json", torch="2.13.0")
    adapter = json.loads((run / "adapter/multimodal.json").read_text())
    adapter["model"]["encoders"]["image"]["revision"] = "0123456789abcdef" * 2 + "01234567"
    (run / "adapter/multimodal.json").write_text(json.dumps(adapter))
    return run, Page(report(run))


@pytest.fixture
def run(finished, tmp_path):
    """A copy, to be changed; with short curves, which are soon drawn."""
    run = copy_of(finished[0], tmp_path, "report.html")
    change_json(
        run / "metrics.json", train={"stages": {"both": stage_of(run, 2) | {"validation": [], "best_step": None}}}
    )
    return run


def test_the_page_is_whole_and_closed(finished):
    run, page = finished
    assert not page.open
    assert page.of("html", lang="en") and page.of("meta", charset="utf-8") and page.of("meta", name="viewport")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"] for link in page.of("a")} <= {f"#{name}" for name in ids}
    assert len(page.of("table")) == len(page.of("caption"))
    assert all(image["alt"] for image in page.of("img")) and all(image["src"] for image in page.of("img"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in pairwise(levels))
    assert (run / "report.html").stat().st_size < 8 * 2**20


def test_nothing_is_loaded_and_only_its_own_script_runs(finished):
    run, page = finished
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "srcset", "poster", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", *EMBEDDED)), tag
        assert not any(name.startswith("on") for name in attributes), tag
    (policy,) = (its["content"] for its in page.of("meta") if its.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ") and "http" not in policy
    (script,) = re.findall(r"<script>(.*?)</script>", (run / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy


def test_scores_and_words_are_those_of_the_run(finished):
    run, page = finished
    metrics = json.loads((run / "metrics.json").read_text())
    values = metrics["scores"]["pictures"]["accuracy"]
    low, high = metrics["intervals"]["pictures"]["accuracy"]["tuned"]
    interval = f"95% CI {low:.0%}–{high:.0%}".replace("%–", "–")
    assert f"On 16 held-out rows the trained model answers {values['tuned']:.0%} right ({interval})" in page.text
    assert f"With blank pictures it falls to {values['blank']:.0%}, so it does use them." in page.text
    assert "with other rows' recordings" in page.text
    assert "against 25% with “red”" in page.text  # four colours, four times each
    weights = metrics["train"]["stages"]["both"]["trained_weights"]
    for text in (
        "0123456789ab",
        "cross_attention",
        "rank 4",
        f"{weights['projectors.image']:,}",
        "2 h 02 min",
        "1.30 GiB",
        "15,432 J",
        "torch 2.13.0",
        "red 4",
    ):
        assert text in page.text, text
    positions = json.loads((run / "certificate.json").read_text())["positions"]
    assert f"100.0% of {positions} next tokens" in page.text
    assert str(run.parent) not in (run / "report.html").read_text(encoding="utf-8")
    columns = "metric trained untrained blank media other media blank pictures blank recordings"
    assert f"pictures, n = 16, with 95% CI {columns} linear probe accuracy" in page.text
    assert f"both, n = 16, with 95% CI {columns} accuracy" in page.text  # no probe of free text
    assert not page.of("aside")
    assert "at least 95.0% was required" in page.text and "at most 0.1 was allowed" in page.text


def test_the_confusion_table_counts_the_predictions(finished):
    run, page = finished
    rows = [row for row in predictions_of(run) if row["task"] == "sounds"]
    right = Counter(row["target"] for row in rows if row["tuned"]["label"] == row["target"])
    label, count = right.most_common(1)[0]
    total = sum(row["target"] == label for row in rows)
    assert re.search(rf"{label} {total} (?:[\d·] )*{count} ", page.text)


def test_every_prediction_is_shown_with_its_media(finished):
    run, page = finished
    assert len([its for its in page.of("li") if "example" in its.get("class", "")]) == 48
    assert len(page.of("audio")) == 32 and len(pictures(page)) == 32
    for image in pictures(page):
        with PIL.Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))) as opened:
            assert max(opened.size) <= 240
    for audio in page.of("audio"):
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(audio["src"].partition(",")[2])))
        assert rate == 16_000 and samples.ndim == 1 and 0 < len(samples) <= 15 * rate
    assert all(Path(row["media"][0]).name in page.text for row in predictions_of(run))
    assert len(page.of("details")) > 3 and "13 more" in page.text  # of 16 right ones three are shown at once
    # Of the wrong ones those first that it was surest of.
    wrong = [row for row in predictions_of(run) if row["task"] == "sounds" and not row["good"]]
    surest = max(wrong, key=lambda row: max(row["tuned"]["probabilities"].values()))
    assert page.of("audio")[0]["aria-label"] == f"recording {Path(surest['media'][0]).name}"


def test_two_reports_of_a_run_are_equal(finished, tmp_path):
    run, _ = finished
    pages = [path.read_text(encoding="utf-8") for path in (report(str(run), tmp_path).path, run / "report.html")]
    first, second = (
        re.sub('data:audio/ogg;base64,[^"]+', "", page) for page in pages
    )  # Ogg has a serial number by chance
    assert first == second and (tmp_path / "report.html").is_file()


def test_a_run_that_has_only_begun_says_what_is_missing(finished, tmp_path):
    shutil.copy(finished[0] / "recipe.yaml", tmp_path)
    path = report(tmp_path, tmp_path / "other.html").path
    assert path == tmp_path / "other.html" and not (tmp_path / "report.html").exists()
    page = Page(path)
    for name in ("metrics.json", "predictions.jsonl", "data/summary.json", "versions.json", "adapter/multimodal.json"):
        assert f"{name} is missing" in page.text
    for text in (
        "Not evaluated yet",
        "not trained yet",
        "Not merged yet",
        "not measured",
        "No losses are known",
    ):
        assert text in page.text, text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="not a run folder"):
        report(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["metrics.json", "predictions.jsonl", "data/summary.json", "recipe.yaml", "adapter/multimodal.json"]
)
@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00\ufffd"])
def test_damaged_files_are_reported(run, name, content):
    write_predictions(run, [row for row in predictions_of(run) if row["task"] == "both"][:4])  # no calibration to draw
    (run / name).write_text(content, encoding="utf-8")
    page = Page(report(run))
    reported = {"predictions.jsonl": "None can be shown" if not content else "lines can't be read"}
    assert page.of("aside") or (name, content) == ("predictions.jsonl", "")
    assert reported.get(name, name) in page.text and str(run.parent) not in page.text


def test_a_damaged_certificate_is_reported(run):
    (run / "certificate.json").write_text('{"format": 1, "merged_into": "x"}')
    page = Page(report(run))
    assert "certificate.json is damaged: why: Field required" in page.text and "Not merged yet" in page.text


def test_damaged_lines_of_predictions_are_counted_and_the_others_shown(run):
    good, *_ = (run / "predictions.jsonl").read_text().splitlines()
    lines = [good, "{", "[1]", '{"task": "pictures"}', "", good.replace("image", "smell")]
    (run / "predictions.jsonl").write_text("\n".join(lines))
    page = Page(report(run))
    assert "predictions.jsonl: 3 lines can't be read, the first is line 2" in page.text
    assert len([its for its in page.of("li") if "example" in its.get("class", "")]) == 2


def test_media_that_moved_or_broke_are_reported(run, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    rows = predictions_of(run)[:6]
    rows[0]["media"], rows[1]["media"] = [str(tmp_path / "broken.png")], [str(tmp_path / "gone.png")]
    rows[2]["kinds"] = ["smell"]
    write_predictions(run, rows)
    page = Page(report(run))
    assert "3 media of the predictions below can't be shown" in page.text
    assert "gone.png: the file is missing" in page.text and "broken.png: not a picture" in page.text
    assert str(tmp_path) not in page.text and len(pictures(page)) == 3


def test_boxes_are_drawn_on_the_first_picture_of_an_example(run):
    rows = [row for row in predictions_of(run) if row["task"] == "both"][:2]
    rows[0] |= {
        "target": [{"label": "cat", "box": [100, 200, 500, 1000]}],
        "tuned": [{"label": "cat", "box": [0, 0, 250, 10]}],
    }
    rows[1] |= {"target": "cat", "tuned": "cat"}
    write_predictions(run, rows)
    page = Page(report(run))
    drawn = [span for span in page.of("span") if "box" in span.get("class", "").split()]
    assert [(span["class"], span["style"]) for span in drawn] == [
        ("box target", "left: 10.0%; top: 20.0%; width: 40.0%; height: 80.0%"),
        ("box tuned", "left: 0.0%; top: 0.0%; width: 25.0%; height: 1.0%"),
    ]
    assert page.text.count("(dashed: target; solid: answer)") == 1


def test_what_data_hold_never_becomes_markup(run, tmp_path):
    media = spoil_run(run, tmp_path)
    page = Page(report(run))
    assert not page.open
    assert len(page.of("script")) == 1 and len(pictures(page)) == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(EVIL) > 10 and EVIL.replace("{{ 7*7 }}", "49") not in page.text
    assert pictures(page)[0]["alt"] == media.name


def test_long_runs_stay_small(run, tmp_path):
    """Long answers, large pictures, long recordings, many tasks, labels and steps."""
    noise = random.Random(0)
    picture = PIL.Image.frombytes("RGB", (1200, 900), noise.randbytes(1200 * 900 * 3))
    picture.save(tmp_path / "large.png", compress_level=1)
    loud = [noise.uniform(-1, 1) for _ in range(40 * 16_000)]
    soundfile.write(tmp_path / "long.wav", loud, 16_000)
    rows, labels = [], [f"label {number} " * 8 for number in range(60)]
    for task in range(9):
        for number in range(60):
            kind, name = ("audio", "long.wav") if task % 2 else ("image", "large.png")
            rows.append(
                {"task": f"t{task}", "row": f"a.csv:{number}", "media": [str(tmp_path / name)] * 9, "kinds": [kind] * 9,
                 "question": "why " * 3000, "target": "long " * 3000, "tuned": "answer " * 3000, "base": "b" * 20_000,
                 "blank": "", "shuffled": None, "good": number / 60},
            )  # fmt: skip
    table = {
        "confusion": {"labels": labels, "counts": [[1] * 61] * 60},
        "per_label": {f"{label}{more}": {"f1": 0.5} for label in labels for more in range(20)},
    }
    write_predictions(run, rows)
    long = stage_of(run, 40_000)
    metrics = json.loads((run / "metrics.json").read_text())
    scores, intervals = ({f"t{task}": metrics[key]["pictures"] for task in range(9)} for key in ("scores", "intervals"))
    tables = {f"t{task}": table for task in range(9)}
    stages = {"stages": {"align": long, "tune": long}}
    change_json(run / "metrics.json", scores=scores, intervals=intervals, tables=tables, train=stages)
    page = Page(report(run))
    assert (run / "report.html").stat().st_size < 8 * 2**20
    assert "are left out to keep the page small" in page.text and "too many for a confusion matrix" in page.text
    assert "and 5 more" in page.text


def test_what_seemed_wrong_with_a_stage_is_said(run):
    metrics = json.loads((run / "metrics.json").read_text())
    name, result = next(iter(metrics["train"]["stages"].items()))
    result |= {"left_out": 3, "pieces": 4, "warnings": ["step 50: the loss no longer falls <b>"]}
    change_json(run / "metrics.json", train=metrics["train"])
    text = Page(report(run)).text
    assert f"{name}: step 50: the loss no longer falls <b>" in text and "left out: 3" in text
    assert f"{name}: memory ran out: packed rows were computed in up to 4 pieces" in text


def test_rows_left_out_are_listed(run, tmp_path):
    source = tmp_path / "data"
    source.mkdir()
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"] = [recipe["data"][0] | {"path": str(source / "train.csv")}]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    checked = [
        {"code": "media", "severity": "error", "file": "train.csv", "line": 9, "text": "no such image", "media": []},
        {"code": "blank", "severity": "warning", "file": "train.csv", "line": 8, "text": "one colour", "media": []},
        {"code": "rows", "severity": "error", "file": "train.csv", "line": None, "text": "not UTF-8", "media": []},
    ]
    (run / "data" / "check.json").write_text(json.dumps({"findings": {"media": 1}, "list": checked}), encoding="utf-8")
    quarantined = {
        "file": str(source / "train.csv"),
        "row": 17,
        "columns": {},
        "reasons": ["图片打不开", "empty label"],
    }
    (source / "quarantine.jsonl").write_text(json.dumps(quarantined) + "\nnot json\n", encoding="utf-8")
    suspects = [("train.csv:4", 3, True), ("train.csv:4", 6, True), ("train.csv:5", 3, False)]
    lines = [
        {"stage": "tune", "step": step, "row": row, "what": "loss not finite", "alone": True, "left_out": left_out}
        for row, step, left_out in suspects
    ]
    (run / "data" / "suspects.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    page = Page(report(run))
    assert "4 rows" in page.text and "train.csv:4 left out of the stage tune from step 3 on: loss not" in page.text
    assert "train.csv:5" not in page.text
    assert "train.csv:9 no such image" in page.text and "train.csv not UTF-8" in page.text
    assert "one colour" not in page.text and "train.csv:17 图片打不开; empty label" in page.text
    assert "quarantine.jsonl beside the sources: 1 lines can't be read" in page.text
