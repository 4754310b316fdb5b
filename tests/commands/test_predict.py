"""Answers to new files and rows are those of the model asked directly, and an interrupted file is gone on with."""

import csv
import json
import re
import shutil
from pathlib import Path
from time import process_time

import pytest
from cli import cli
from tiny import tiny_picture
from trained_runs import HEADS, copy_of

import finetune
from finetune.commands import predict as predicting
from finetune.commands._answers_file import AnswersFile, PredictedRow
from finetune.common.errors import DataError, RecipeError
from finetune.common.registry import load_part
from finetune.data.questions import Input, read_inputs
from finetune.data.sample import Row
from finetune.recipe.parts import TaskPart
from finetune.recipe.schema import RowFile
from finetune.recipe.yaml_reader import dump_yaml, read_yaml


@pytest.fixture(scope="module")
def plain(finished_run):
    return finished_run("plain")


@pytest.fixture(scope="module")
def heads(finished_run):
    return finished_run("heads")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "new"
    (folder / "deeper").mkdir(parents=True)
    for number, name in enumerate(["b.png", "a.png", "deeper/c.png", "d.png", "e.png"]):
        tiny_picture((40 * number, 200 - 30 * number, 90)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def read(path: Path) -> list[dict]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_a_bar_counts_rows_as_they_are_answered_and_those_of_before(plain, pictures, tmp_path):
    out = tmp_path / "answers.jsonl"
    command = ("predict", plain, pictures, "--out", out, "--batch", 2, "--max-new-tokens", 2)
    assert re.search(r"^answers .* 5/5 ", cli(*command).stderr, re.M)
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:3]))
    assert re.search(r"^answers .* 5/5 ", cli(*command).stderr, re.M)


def test_a_folder_of_pictures_is_answered_as_one_by_one(plain, pictures, tmp_path):
    (pictures / "torn.png").write_bytes((pictures / "a.png").read_bytes()[:40])
    out = tmp_path / "answers.csv"
    done = cli("predict", plain, pictures, "--out", out, "--batch", 4, "--max-new-tokens", 4)
    assert done.returncode == 1, done.stderr
    assert "1 other files in the folders were left out: notes.txt" in done.stdout
    assert "1 row without an answer" in done.stdout and "5 of 6 rows answered" in done.stdout
    rows = read(out)
    assert list(rows[0]) == ["file", "answer", "error"]
    assert [row["file"] for row in rows] == [
        str(pictures / name) for name in ("a.png", "b.png", "d.png", "deeper/c.png", "e.png", "torn.png")
    ]
    assert "torn.png" in rows[-1]["error"] and not rows[-1]["answer"]
    model = finetune.load(plain)
    for row in rows[:-1]:
        assert row["answer"] == model.answer("What is this?", image=row["file"], max_new_tokens=4), row
        assert not row["error"]


def test_rows_that_failed_are_asked_again_and_a_finished_file_stays(plain, pictures, tmp_path):
    whole = (pictures / "a.png").read_bytes()
    (pictures / "a.png").write_bytes(b"")
    out = tmp_path / "answers.jsonl"
    first = finetune.predict(plain, pictures, out)
    assert [row.error != "" for row in first.rows] == [True, False, False, False, False]
    (pictures / "a.png").write_bytes(whole)
    second = finetune.predict(plain, pictures, out)
    assert not second.errors and second.rows[1:] == first.rows[1:]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["file"] for line in lines] == [row.row for row in second.rows]
    assert [line["answer"] for line in lines] == [row.answer for row in second.rows]
    before = out.read_bytes()
    with pytest.raises(DataError, match="all 5 rows are answered in it; overwrite=True"):
        finetune.predict(plain, pictures, out)
    assert out.read_bytes() == before


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_an_interrupted_file_is_gone_on_with(suffix, heads, pictures, tmp_path, monkeypatch):
    """Torn in the middle of its third row: two rows stay as they are, the others are asked."""
    out, whole = tmp_path / f"answers.{suffix}", tmp_path / f"whole.{suffix}"
    finetune.predict(heads, pictures, whole, task="colour")
    lines = whole.read_bytes().splitlines(keepends=True)
    kept = lines[: 2 + (suffix == "csv")]
    out.write_bytes(b"".join(kept) + lines[len(kept)][:-20])
    asked: list[str] = []
    real = predicting.Questions.answered

    def counted(self, rows, total):
        asked.extend(one.name for one in rows)
        return real(self, rows, total)

    monkeypatch.setattr(predicting.Questions, "answered", counted)
    result = finetune.predict(heads, pictures, out, task="colour")
    assert len(asked) == 3 and asked == [row.row for row in result.rows[2:]]
    assert out.read_bytes() == whole.read_bytes() and not result.errors


def answers_file(path: Path, *columns: dict[str, str]) -> AnswersFile:
    inputs = [
        Input(f"rows.csv:{number}", Row(Path("rows.csv"), number, {}, Path()), one)
        for number, one in enumerate(columns, 2)
    ]
    return AnswersFile(path, inputs, (), str)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("end", ["\r\n", "\r", "\n"])
def test_lines_within_cells_stay_as_they_are(end, suffix, tmp_path):
    """Also after an interruption, when the file is read back."""
    text = f"one{end}two"
    file = answers_file(tmp_path / f"answers.{suffix}", {"text": text}, {"text": "x"})
    first = PredictedRow("rows.csv:2", {"text": text}, text)
    with file.appending([]) as append:
        append(first)
    assert file.answered() == {"rows.csv:2": first}
    if suffix == "csv":
        assert [(row["text"], row["answer"]) for row in read(file.path)] == [(text, text)]


def test_rows_of_two_tables_of_one_name_are_told_apart(tmp_path):
    files = [tmp_path / folder / "test.csv" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text("text\nred\n")
    inputs, _ = read_inputs(files, (), lambda path: RowFile(path=path), 77)
    assert [one.name for one in inputs] == [f"{file}:2" for file in files] and inputs[0].row.max_bytes == 77
    assert read_inputs(files[:1], (), lambda path: RowFile(path=path), 77)[0][0].name == "test.csv:2"
    with pytest.raises(DataError, match="named twice"):
        read_inputs([files[0], files[0]], (), lambda path: RowFile(path=path), 77)


def test_many_rows_are_compared_at_once(tmp_path):
    """In seconds: with a comparison of all pairs it took minutes."""
    (tmp_path / "rows.csv").write_text("text\n" + "red\n" * 30_000)
    before = process_time()
    with pytest.raises(DataError, match="30000 rows or files are named twice"):
        read_inputs([tmp_path / "rows.csv"] * 2, (), lambda path: RowFile(path=path), 77)
    assert process_time() - before < 10


def test_answers_fed_back_keep_every_column(tmp_path):
    columns = {"row": "a", "answer": "b", "input_answer": "c", "input_input_answer": "d", "error": "e"}
    file = answers_file(tmp_path / "answers.csv", columns, columns)
    first = PredictedRow("rows.csv:2", columns, "new")
    with file.appending([]) as append:
        append(first)
    (line,) = read(file.path)
    assert [line[name] for name in file.kept.values()] == [*columns.values()] and line["answer"] == "new"
    assert file.answered() == {"rows.csv:2": first}


def test_a_record_with_other_cells_is_reported(tmp_path):
    file = answers_file(tmp_path / "answers.csv", {"text": "a"}, {"text": "b"})
    file.path.write_text("row,text,answer,error\nrows.csv:2,a,x,\nrows.csv:3,b\n")
    with pytest.raises(DataError, match="record 2 holds something else"):
        file.answered()


def test_rows_are_on_disk_before_the_next_batch(plain, pictures, tmp_path, monkeypatch):
    out = tmp_path / "answers.jsonl"
    counts = []
    real = predicting.Questions._batch

    def counted(self, rows):
        counts.append(len(out.read_text().splitlines()))
        return real(self, rows)

    monkeypatch.setattr(predicting.Questions, "_batch", counted)
    finetune.predict(plain, pictures, out, options=predicting.PredictOptions(batch=2))
    assert counts == [0, 2, 4]


@pytest.mark.parametrize("task", HEADS)
def test_every_head_answers_a_table_without_answers(task, heads, tmp_path):
    """Columns of the rows are kept; answers, probabilities and numbers are those of the assistant."""
    source = heads.parent / "rows" / f"{task}-test.csv"
    rows = [{key: row[key] for key in ("image", "text")} for row in read(source)]
    table = tmp_path / "rows.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["photo", "text", "answer"])
        writer.writeheader()
        writer.writerows({"photo": row["image"], "text": row["text"], "answer": "known"} for row in rows)
    options = predicting.PredictOptions(media_folder=heads.parent / "rows", max_new_tokens=6)
    out = tmp_path / "answers.csv"
    result = finetune.predict(heads, table, out, task=task, columns={"image": "photo"}, options=options)
    model = finetune.load(heads)
    labels = model.model.bindings[task].settings.labels
    written = read(out)
    ours = ["answer", *(["rank"] if task == "order" else []), *(f"probability_{label}" for label in labels), "error"]
    assert list(written[0]) == ["row", "photo", "text", "input_answer", *ours]
    for number, (row, line, predicted) in enumerate(zip(rows, written, result.rows, strict=True), 2):
        assert (line["row"], line["photo"], line["input_answer"]) == (f"rows.csv:{number}", row["image"], "known")
        picture = heads.parent / "rows" / row["image"]
        prompt = HEADS[task]["task"].get("prompt", "What is this?")
        if task in ("colour", "likely"):
            expected = model.probabilities(prompt, task=task, image=picture)
            assert predicted.probabilities == pytest.approx(expected, abs=1e-3)
            assert predicted.answer == line["answer"] == max(expected, key=expected.__getitem__)
            assert float(line[f"probability_{line['answer']}"]) == pytest.approx(max(expected.values()), abs=1e-3)
        elif task == "mark":
            assert float(line["answer"]) == predicted.answer
            assert predicted.answer == pytest.approx(model.number(prompt, task=task, image=picture), abs=1e-2)
        elif task == "order":
            assert int(line["rank"]) == 1 + sum(other.answer > predicted.answer for other in result.rows)
        elif task == "words":
            said = model.answer(f"{row['text']}\n{prompt}", max_new_tokens=6)
            assert line["answer"] == said


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_ranks_are_within_groups_and_written_once_all_rows_are_answered(suffix, tmp_path):
    """Of two users, one with equal answers, one called 0; rows that failed have no rank, or have no user."""
    task = TaskPart("rank", load_part("tasks", "rank").Options())
    inputs = [
        Input(f"t.csv:{number}", Row(tmp_path / "t.csv", number, {"group": user}, tmp_path), {"group": str(user)})
        for number, user in enumerate([0, 0, *"bbbb", "  "], 2)
    ]
    answers = [0.1, 0.7, 2.5, 0.5, 2.5, None, None]
    rows = [
        PredictedRow(one.name, one.columns, answer, error="" if answer is not None else "torn")
        for one, answer in zip(inputs, answers, strict=True)
    ]
    file = AnswersFile(tmp_path / f"out.{suffix}", inputs, (), json.loads, ranks=True)
    with file.appending(rows):
        pass
    done = file.answered()
    assert [row.rank for row in done.values()] == [None] * 5
    ranked = predicting.ranked(rows, inputs, task)
    assert [row.rank for row in ranked] == [2, 1, 1, 3, 1, None, None]
    with file.appending(ranked):
        pass
    assert [*file.answered().values()] == ranked[:5]


def test_a_file_whose_ranks_are_missing_is_not_finished(tmp_path):
    inputs = [Input("t.csv:2", Row(tmp_path / "t.csv", 2, {}, tmp_path), {})]
    file = AnswersFile(tmp_path / "out.csv", inputs, (), json.loads, ranks=True)
    for rank in (None, 1):
        with file.appending([PredictedRow("t.csv:2", {}, 0.5, rank=rank)]):
            pass
        if rank is None:
            assert len(file.answered()) == 1
    with pytest.raises(DataError, match="all 1 rows are answered"):
        file.answered()


SENTENCES = (
    "客户说上个月的账单比合同里写的多了三十元",
    "我们的工程师明天上午会到您家里检查网络",
    "这个问题已经解决了请您给我们的服务打分",
    "他要求退款因为收到的商品和图片上的不一样",
)


def with_recipe_changed(run: Path, tmp_path: Path, columns: dict[str, str], **options: str) -> Path:
    """A copy of the run of every head, whose `words` rows were read with these columns and options of tables."""
    copy = copy_of(run, tmp_path, "checkpoints", "merged")
    recipe = read_yaml((copy / "recipe.yaml").read_text(), "recipe.yaml").value
    for source in recipe["data"]:
        if source["name"] == "words":
            source |= {"columns": columns, "format": {"kind": "table", **options}}
    (copy / "recipe.yaml").write_text(dump_yaml(recipe))
    return copy


@pytest.mark.parametrize("written", ["gb18030", "utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";"])
@pytest.mark.parametrize("options", [{}, {"encoding": "gb18030", "delimiter": ";"}])
def test_a_table_laid_out_as_the_training_rows_needs_no_options(
    options, delimiter, written, heads, tmp_path, monkeypatch
):
    """Whichever encoding and delimiter the recipe names: cleaned training rows are UTF-8, their source needn't be."""
    run = with_recipe_changed(heads, tmp_path, {"text": "句子"}, **options)
    texts = [f"{number} {text}" for number in range(8) for text in SENTENCES]
    lines = [f"句子{delimiter}note", *(f"{text}{delimiter}x" for text in texts)]
    (tmp_path / "december.csv").write_text("\n".join(lines), encoding=written)

    def unanswered(questions, rows):
        asked = [questions._question(one)[-1].content[0] for one in rows]
        return [PredictedRow(one.name, one.columns, text) for one, text in zip(rows, asked, strict=True)]

    monkeypatch.setattr(predicting.Questions, "_batch", unanswered)
    monkeypatch.setattr(predicting, "_loaded", lambda run: None)
    rows = finetune.predict(run, tmp_path / "december.csv", task="words").rows
    assert [row.answer for row in rows] == [f"{text}\nSay it." for text in texts]


def test_what_is_wrong_with_all_rows_is_one_error_that_names_the_option(heads, tmp_path):
    (tmp_path / "rows.csv").write_text("sentence\n" + "red\n" * 21)
    done = cli("predict", heads, tmp_path / "rows.csv", "--task", "words", "--out", tmp_path / "answers.csv")
    assert done.returncode == 2 and not (tmp_path / "answers.csv").exists()
    assert done.stderr.splitlines() == [
        "rows.csv:2, as in all 21 rows: no column 'text' (columns: 'sentence'); "
        "say which it is with --columns text=NAME"
    ]


def table_of_pictures(pictures: Path, folder: str) -> Path:
    table = pictures / "rows.csv"
    table.write_text("Datei\n" + "".join(f"{folder}{name}.png\n" for name in "abde"))
    return table


def test_media_in_a_folder_beside_the_table_are_found(plain, pictures, monkeypatch):
    (pictures / "pics").mkdir()
    for name in "abde":
        (pictures / f"{name}.png").rename(pictures / "pics" / f"{name}.png")
    monkeypatch.setattr(predicting.Questions, "_batch", lambda self, rows: [self._question(one) for one in rows])
    monkeypatch.setattr(predicting, "_loaded", lambda run: None)
    asked = finetune.predict(plain, table_of_pictures(pictures, ""), columns={"image": "Datei"}).rows
    assert [question[-1].content[0].path.name for question in asked] == ["a.png", "b.png", "d.png", "e.png"]


def test_media_that_are_all_missing_are_one_error(plain, pictures, tmp_path):
    table, out = table_of_pictures(pictures, "gone/"), tmp_path / "answers.csv"
    done = cli("predict", plain, table, "--columns", "image=Datei", "--out", out)
    assert done.returncode == 2 and not out.exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith("rows.csv:2, as in all 4 rows: no such image: ")
    assert line.endswith("a.png; name their folder with --media-folder")


def test_an_encoding_that_is_not_clear_is_named_with_the_option(heads, tmp_path):
    table = tmp_path / "rows.csv"
    table.write_bytes("text\nnaïve\n".encode("cp1252"))
    with pytest.raises(DataError, match="its encoding isn't clear; name it with encoding=, as gb18030"):
        finetune.predict(heads, table, task="words")
    options = predicting.PredictOptions(encoding="cp1252", max_new_tokens=1)
    assert finetune.predict(heads, table, task="words", options=options).rows[0].columns == {"text": "naïve"}
    options = predicting.PredictOptions(encoding="latin-nine")
    with pytest.raises(RecipeError, match="encoding=latin-nine: write an encoding such as"):
        finetune.predict(heads, table, task="words", options=options)


def test_another_prompt_is_asked(plain, pictures):
    asked = finetune.predict(plain, pictures / "a.png", prompt="Which colour?")
    assert asked.out is None and asked.rows[0].answer == finetune.load(plain).answer(
        "Which colour?", image=pictures / "a.png"
    )
    assert f">{asked.rows[0].answer}</td>" in asked._repr_html_()


def test_what_can_not_be_meant_is_refused(plain, heads, pictures, tmp_path):
    out = tmp_path / "answers.csv"
    with pytest.raises(RecipeError, match=r"nowhere: no such file"):
        finetune.predict(plain, tmp_path / "nowhere", out)
    with pytest.raises(RecipeError, match=r"\.csv or \.jsonl"):
        finetune.predict(plain, pictures, tmp_path / "answers.xlsx")
    with pytest.raises(RecipeError, match="name one with task="):
        finetune.predict(heads, pictures, out)
    with pytest.raises(DataError, match="named twice"):
        finetune.predict(plain, [pictures, pictures / "a.png"], out)
    shutil.rmtree(pictures / "deeper")
    for name in ("a", "b", "d", "e"):
        (pictures / f"{name}.png").unlink()
    with pytest.raises(DataError, match="no image in it, of 1 files"):
        finetune.predict(plain, pictures, out)
    assert not out.exists()


def test_a_file_of_something_else_is_refused_before_the_model_is_loaded(plain, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(predicting, "_loaded", lambda run: pytest.fail("loaded"))
    (tmp_path / "answers.csv").write_text("name,phone\nAnn,1\n")
    with pytest.raises(DataError, match="columns are others"):
        finetune.predict(plain, pictures, tmp_path / "answers.csv")


def test_a_file_of_something_else_stays_as_it_is(plain, pictures, tmp_path):
    out = tmp_path / "answers.csv"
    out.write_text("name,phone\nAnn,1\n")
    with pytest.raises(DataError, match="columns are others; name another file with out="):
        finetune.predict(plain, pictures, out)
    out.write_text("file,answer,error\nelsewhere.png,cat,\n")
    with pytest.raises(DataError, match=r"'elsewhere.png' isn't among these"):
        finetune.predict(plain, pictures, out)
    assert out.read_text() == "file,answer,error\nelsewhere.png,cat,\n"
    options = predicting.PredictOptions(overwrite=True)
    assert len(finetune.predict(plain, pictures, out, options=options).rows) == len(read(out)) == 5
