"""The data of the five cases: that their scripts plan them, that nothing leaks, and that one medium isn't enough."""

import csv
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy
import pytest
import soundfile
from PIL import Image

from finetune.commands.recipes import recipes_folder
from finetune.data.media import decode
from finetune.data.sample import Row
from finetune.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "recipes" / "data"
CASES = ("sentiment", "recommend", "radiology", "support-calls", "m6")
SPLITS = ("train", "test")

sys.path.insert(0, str(ROOT / "recipes" / "offline"))
try:
    import make_m6
    import make_radiology
    import make_recommend
    import make_sentiment
    import make_support_calls
finally:
    sys.path.pop(0)


def table(case: str, name: str) -> list[dict[str, str]]:
    with (DATA / case / f"{name}.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert all(all(row.values()) for row in rows)
    return rows


def best_guess(rows: list[dict[str, str]], known: tuple[str, ...], asked: str) -> float:
    """Share of rows that are right for whoever always says what is commonest given `known`."""
    seen: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for row in rows:
        seen[tuple(row[column] for column in known)][row[asked]] += 1
    return sum(max(counts.values()) for counts in seen.values()) / len(rows)


def only_kept(rows: list[dict[str, str]], columns: list[str]) -> list[dict[str, str]]:
    return [{column: row[column] for column in columns} for row in rows]


@pytest.mark.parametrize("case", CASES)
def test_a_case_is_small_bilingual_and_says_how_it_was_made(case):
    size = sum(path.stat().st_size for path in (DATA / case).rglob("*") if path.is_file())
    assert size < 2_600_000
    notice = (DATA / case / "NOTICE.md").read_text(encoding="utf-8")
    assert f"make_{case.replace('-', '_')}.py" in notice and "licence" in notice
    for split in SPLITS:
        languages = Counter(row["language"] for row in table(case, split))
        assert set(languages) == {"zh", "en"} and min(languages.values()) >= 0.2 * languages.total()


@pytest.mark.parametrize("case", CASES)
def test_media_are_there_and_on_one_side_only(case):
    medium = "audio" if case == "support-calls" else "image"
    folder = DATA if case in ("recommend", "support-calls", "m6") else DATA / case
    sides = [{row[medium] for row in table(case, split)} for split in SPLITS]
    assert not sides[0] & sides[1]
    for name in sides[0] | sides[1]:
        assert Row(folder / "x.csv", 1, {medium: name}, folder).media((medium,))[0].path.is_file()


@pytest.mark.parametrize("case", CASES)
def test_its_recipe_asks_with_text_alone_media_alone_and_both(case):
    recipe = load_recipe(recipes_folder() / f"{case}.yaml")
    kinds: dict[str, set[bool]] = defaultdict(set)
    for source in recipe.data:
        options = source.task.options
        question = getattr(options, "question", "")
        texts = [options.text] if isinstance(options.text, str) else options.text
        asked = "media" * bool(options.media) + "text" * bool(any(texts) or question)
        kinds[source.split].add(asked)
    assert kinds["train"] == kinds["test"] == {"media", "text", "mediatext"}
    names = {split: {s.name for s in recipe.data if s.split == split} for split in SPLITS}
    assert names["train"] == names["test"]


def test_posts_are_those_that_their_script_plans():
    for split in SPLITS:
        rows = table("sentiment", split)
        assert only_kept(make_sentiment.plan(split), list(rows[0])) == rows
    texts = [{row["text"] for row in table("sentiment", split)} for split in SPLITS]
    emoji = [{row["image"].split("-")[1] for row in table("sentiment", split)} for split in SPLITS]
    assert not texts[0] & texts[1] and not emoji[0] & emoji[1]
    for split in SPLITS:
        for row in table("sentiment", split):
            assert chr(int(row["image"].split("-")[1], 16)) in make_sentiment.PICTURES[row["image_mood"]]


def test_the_mood_of_a_post_needs_text_and_picture():
    for split in SPLITS:
        rows = table("sentiment", split)
        assert len(set(Counter(row["label"] for row in rows).values())) == 1
        assert best_guess(rows, ("text_mood", "image_mood"), "label") == 1
        for alone in ("text_mood", "image_mood"):
            assert 0.7 < best_guess(rows, (alone,), "label") < 0.8


def test_shoppers_are_those_that_their_script_plans():
    pictures = {split: make_recommend.read_rows(DATA / "emoji" / f"{split}.csv") for split in SPLITS}
    for split in SPLITS:
        rows = table("recommend", split)
        assert make_recommend.plan(pictures, split) == rows
        assert make_recommend.catalog(pictures, split) == table("recommend", f"catalog-{split}")
        users = Counter(row["user"] for row in rows)
        assert set(users.values()) == {make_recommend.SHOWN}
        clicks = Counter(row["user"] for row in rows if row["clicked"] == "1")
        assert set(clicks.values()) == {make_recommend.CLICKS} and clicks.keys() == users.keys()


def test_clicks_follow_history_and_offer():
    rows = [row for split in SPLITS for row in table("recommend", split)]
    words = {chinese: (chinese, english) for english, (_, chinese, _) in make_recommend.SHELVES.items()}

    def share(kept) -> float:
        chosen = [row["clicked"] == "1" for row in rows if kept(row)]
        return sum(chosen) / len(chosen)

    def own(row) -> bool:
        return any(f"（{word}）" in row["history"] or f"({word})" in row["history"] for word in words[row["shelf"]])

    def sells(row) -> bool:
        return "热卖" in row["offer"] or "bestseller" in row["offer"]

    assert share(own) > 0.5 > 0.3 > share(lambda row: not own(row))
    assert share(sells) > share(lambda row: not sells(row)) + 0.1
    assert share(lambda row: own(row) and sells(row)) > 0.7
    assert share(lambda row: not own(row) and not sells(row)) < 0.15


def test_scans_are_those_that_their_script_draws():
    tables = make_radiology.plan()
    for name, rows in tables.items():
        assert rows == table("radiology", name)
    for row in tables["test"][:6] + tables["test-dicom"][:6]:
        kind = "dicom" if row["image"].endswith(".dcm") else "png"
        if kind == "dicom":
            pytest.importorskip("pydicom")
        shown = numpy.asarray(decode("image", DATA / "radiology" / row["image"]).convert("L")) / 255
        assert numpy.abs(shown - make_radiology.scan_of(row)).mean() < (0.005 if kind == "dicom" else 0.03)


def test_a_finding_shows_on_its_side():
    """The lung that is told is brighter than in clear scans, where the heart makes the left one so: the right lung is
    on the left of the picture.
    """
    brighter: dict[str, list[float]] = defaultdict(list)
    for row in table("radiology", "test"):
        with Image.open(DATA / "radiology" / row["image"]) as picture:
            grey = numpy.asarray(picture.convert("L"), dtype=float)
        shown = row["side"] if row["finding_en"] in ("infection", "mass") else row["finding_en"]
        brighter[shown].append(grey[24:90, 26:52].mean() - grey[24:90, 76:102].mean())
    clear = numpy.mean(brighter["normal"])
    assert min(len(brighter["right"]), len(brighter["left"])) > 15
    assert numpy.mean(numpy.array(brighter["right"]) > clear) > 0.9
    assert numpy.mean(numpy.array(brighter["left"]) < clear) > 0.9


def test_a_finding_needs_scan_and_record():
    for split in SPLITS:
        rows = table("radiology", split)
        for row in rows:
            row["shown"] = "opacity" if row["finding_en"] in ("infection", "mass") else row["finding_en"]
            row["fever"] = str(bool(re.search(r"\d\d\.\d", row["record"])))
        assert best_guess(rows, ("shown",), "finding") < 0.8
        assert best_guess(rows, ("fever",), "finding") < 0.6
        assert best_guess(rows, ("shown", "fever"), "finding") > 0.93
    records = [row["record"] for name in (*SPLITS, "test-dicom") for row in table("radiology", name)]
    assert len(set(records)) == len(records)


def test_support_calls_are_those_that_their_script_plans():
    said = []
    for split in SPLITS:
        rows = table("support-calls", split)
        calls = make_support_calls.read_rows(DATA / "calls" / f"{split}.csv")
        assert only_kept(make_support_calls.plan(calls, split), list(rows[0])) == rows
        assert len(set(Counter(row["intent"] for row in rows).values())) == 1
        said += rows
    files = {path.name for path in (DATA / "support-calls" / "audio").iterdir()}
    assert files == {Path(row["audio"]).name for row in said if row["language"] == "en"}
    for file in sorted(files)[::8]:
        heard = soundfile.info(DATA / "support-calls" / "audio" / file)
        assert (heard.samplerate, heard.channels) == (16_000, 1) and 0.5 < heard.duration < 4


def test_a_reply_needs_speech_and_record():
    rows = [row for split in SPLITS for row in table("support-calls", split)]
    for row in rows:
        row["order"] = re.sub(r"\d{4}", "", row["record"])
    heard = ("intent", "thing", "language")
    assert best_guess(rows, (*heard, "order"), "reply") == 1
    assert best_guess(rows, heard, "reply") < 0.6  # few rows a group: 0.25 of many
    assert best_guess(rows, ("order",), "reply") < 0.1


def test_m6_is_what_its_script_plans_and_a_name_alone_tells_nothing():
    for split in SPLITS:
        rows = table("m6", split)
        pictures = make_m6.read_rows(DATA / "emoji" / f"{split}.csv")
        assert make_m6.plan(pictures, split) == only_kept(rows, list(make_m6.plan(pictures, split)[0]))
        labels = {f"emoji/{p['image']}": {p["label"], p["label_en"]} for p in pictures}
        names = {f"emoji/{p['image']}": {p["name_zh"], p["name_en"]} for p in pictures}
        assert Counter(row["match"] for row in rows) == {"是": len(rows) // 2, "否": len(rows) // 2}
        assert set(Counter(row["text"] for row in rows).values()) == {1}
        for row in rows:
            assert (row["text"] in names[row["image"]]) == (row["match"] == "是")
            assert row["answer"] in labels[row["image"]] and row["end"] == row["answer"]
            assert row["answer"] in row["question"]
        first = sum(row["question"].index(row["answer"]) < len(row["question"]) / 2 for row in rows)
        assert 0.35 < first / len(rows) < 0.65
