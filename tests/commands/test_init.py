"""finetune init: a recipe that `check` accepts, for each kind of rows that users bring."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import openpyxl
import pytest
import typer.testing
from cli import cli
from loopback import asked_of, hub_on_loopback
from media_files import video
from tiny import tiny_llm_folder, tiny_picture, tiny_vision_folder
from tiny_encoders import tiny_audio_folder
from tiny_formats import common_voice, put, sound

import finetune
from finetune.commands._init import cards
from finetune.commands._init.columns import describe_columns, language_of
from finetune.commands.cli import app
from finetune.common.errors import DataError, RecipeError
from finetune.recipe.load import Recipe, load_recipe

ROWS = 24
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
LABELS = tuple(COLOURS)


@pytest.fixture(autouse=True)
def in_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def table(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]], **options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        csv.writer(file, **options).writerows([header, *rows])
    return path


def pictures(folder: Path, count: int = ROWS) -> list[str]:
    """Files of pictures, each of other content, of three colours in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        red, green, blue = COLOURS[LABELS[number % 3]]
        tiny_picture((red, green, (blue + number) % 256)).save(folder / name)
    return names


def recordings(folder: Path, count: int = ROWS) -> list[str]:
    """0.1 s of silence each, with some bytes behind it that differ."""
    return [put(folder / f"{n}.wav", sound() + bytes([n] * 2)).name for n in range(count)]


def written(path: Path, **choices: object) -> Recipe:
    """The recipe that init writes; `check` accepts it, and it is short."""
    file = finetune.init(path, **{"card": "cpu", **choices}).path
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 30 and text.startswith(f"# {file.stem}: ")
    counts = finetune.check(file).splits
    assert counts["train"].rows and counts["test"].rows
    return load_recipe(file)


def class_folders() -> Path:
    for number, name in enumerate(pictures(Path("all"))):
        target = Path("pets") / ("cats", "dogs")[number % 2] / name
        target.parent.mkdir(parents=True, exist_ok=True)
        Path("all", name).rename(target)
    return Path("pets")


def with_labels() -> Path:
    rows = [[f"{n}.png", LABELS[n % 3], n] for n in range(len(pictures(Path("shop"))))]
    return table(Path("shop/products.csv"), ["photo", "shelf", "number"], rows)


def sheet() -> Path:
    book = openpyxl.Workbook()
    for row in [["image", "label"], *([f"{n}.png", LABELS[n % 3]] for n in range(len(pictures(Path("shop")))))]:
        book.active.append(row)
    book.save("shop/products.xlsx")
    return Path("shop/products.xlsx")


def captions() -> Path:
    names = pictures(Path("album/images"))
    rows = [{"file": name, "caption": f"A {LABELS[n % 3]} square, seen {n} times"} for n, name in enumerate(names)]
    return put(Path("album/rows.jsonl"), "\n".join(map(json.dumps, rows))).parent


def questions() -> Path:
    rows = [[name, f"What is on square {n}?", f"a dot {n}"] for n, name in enumerate(pictures(Path("charts")))]
    return table(Path("charts/rows.csv"), ["image", "question", "answer"], rows)


def many_answers() -> Path:
    names = pictures(Path("vqa"))
    rows = [
        {"image": name, "question": "Which?", "answers": [f"dot {n}", "dot", f"{n}"]} for n, name in enumerate(names)
    ]
    return put(Path("vqa/rows.json"), rows)


def transcripts() -> Path:
    rows = [[name, f"the quick fox {n}"] for n, name in enumerate(recordings(Path("speech/wavs")))]
    return table(Path("speech/rows.tsv"), ["file", "sentence"], rows, delimiter="\t").parent


def corpus() -> Path:
    folder = common_voice(Path("voices"))
    recordings(folder / "clips")
    rows = "".join(f"c{n % 12}\t{n}.wav\tthe quick fox {n}\ttwenties\n" for n in range(ROWS))
    put(folder / "validated.tsv", "client_id\tpath\tsentence\tage\n" + rows)
    return folder


def pairs() -> Path:
    for n, name in enumerate(recordings(Path("spoken"))):
        put(Path("spoken") / f"{Path(name).stem}.txt", f"the quick fox {n}")
    return Path("spoken")


def clips() -> Path:
    names = [put(Path("clips") / f"{n}.mp4", video(range(20, 60 + n, 10))).name for n in range(6)]
    return table(Path("clips/rows.csv"), ["clip", "label"], [[name, LABELS[n % 2]] for n, name in enumerate(names)])


def two_media() -> Path:
    seen, heard = pictures(Path("both/images")), recordings(Path("both/sounds"))
    rows = [[f"images/{a}", f"sounds/{b}", LABELS[n % 3]] for n, (a, b) in enumerate(zip(seen, heard, strict=True))]
    return table(Path("both/rows.csv"), ["picture", "call", "label"], rows)


def ratings() -> Path:
    rows = [[name, n % 5 + 1] for n, name in enumerate(pictures(Path("rated")))]
    return table(Path("rated/rows.csv"), ["image", "rating"], rows)


def prices() -> Path:
    rows = [[name, 9.5 + 3 * n] for n, name in enumerate(pictures(Path("priced")))]
    return table(Path("priced/rows.csv"), ["image", "price"], rows)


def text_only() -> Path:
    rows = [[n, f"The delivery number {n} was late", LABELS[n % 2]] for n in range(ROWS)]
    return table(Path("posts.csv"), ["id", "post", "label"], rows)


def several_labels() -> Path:
    rows = [[name, ";".join(LABELS[: n % 3 + 1])] for n, name in enumerate(pictures(Path("tagged")))]
    return table(Path("tagged/rows.csv"), ["image", "tags"], rows)


def boxes() -> Path:
    names = pictures(Path("boxed"))
    rows = [{"image": name, "phrase": f"dot {n}", "bbox": [20, 10, 8, 9 + n % 3]} for n, name in enumerate(names)]
    return put(Path("boxed/rows.jsonl"), "\n".join(map(json.dumps, rows)))


def fractions(form: Callable[[float], str]) -> Path:
    """Boxes as text, in fractions; the smallest number is 0.00001."""
    rows = [
        [name, f"dot {n}", " ".join(map(form, (1e-05, 0.2, 0.5, 0.6)))] for n, name in enumerate(pictures(Path("f")))
    ]
    return table(Path("f/rows.csv"), ["image", "phrase", "bbox"], rows)


@pytest.mark.parametrize("form", [str, lambda number: f"{number:.5f}".lstrip("0")])
def test_fractions_are_recognised_however_they_are_written(form):
    options = written(fractions(form)).data[0].task.options
    assert (options.units, options.order) == ("fractions", "corners")


def forms() -> Path:
    names = pictures(Path("forms"))
    rows = [{"image": name, "json": {"total": n, "shop": f"shop {n}"}} for n, name in enumerate(names)]
    return put(Path("forms/rows.jsonl"), "\n".join(map(json.dumps, rows)))


def conversations() -> Path:
    names = pictures(Path("talk"))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}]
    return put(Path("talk/rows.json"), [{"image": name, "conversations": turns} for name in names])


@pytest.mark.parametrize(
    ("rows", "kind", "options", "media"),
    [
        (class_folders, "classify", {"label": "label"}, ["image"]),
        (with_labels, "classify", {"label": "shelf"}, ["image"]),
        (sheet, "classify", {}, ["image"]),
        (captions, "caption", {"caption": "caption"}, ["image"]),
        (questions, "answer", {"question": "question", "answer": "answer"}, ["image"]),
        (many_answers, "vqa", {"answers": "answers"}, ["image"]),
        (transcripts, "transcribe", {"text": "sentence"}, ["audio"]),
        (corpus, "transcribe", {"text": "text"}, ["audio"]),
        (pairs, "transcribe", {"text": "text"}, ["audio"]),
        (clips, "classify", {}, ["video"]),
        (two_media, "classify", {}, ["image", "audio"]),
        (ratings, "score", {"number": "rating", "minimum": 1.0, "maximum": 5.0}, ["image"]),
        (prices, "score", {"number": "price", "minimum": None}, ["image"]),
        (text_only, "classify", {"text": "post"}, []),
        (several_labels, "classify", {"label": "tags", "separator": ";"}, ["image"]),
        (boxes, "ground", {"boxes": "bbox", "text": "phrase", "order": "corner_and_size"}, ["image"]),
        (forms, "extract", {"answer": "json"}, ["image"]),
        (conversations, "chat", {}, ["image"]),
    ],
)
def test_the_task_is_that_of_the_rows(rows: Callable[[], Path], kind, options, media):
    recipe = written(rows())
    task = recipe.data[0].task
    assert task.kind == kind and [*task.media] == media == [*recipe.model.encoders]
    chosen = task.options.model_dump()
    assert {key: chosen[key] for key in options} == options
    assert recipe.data[0].head.kind == ("score" if kind == "score" else "language")


def test_an_answer_is_one_of_the_labels_where_they_are_few():
    recipe = written(with_labels())
    assert recipe.data[0].head.options.answers == "labels"
    assert recipe.data[0].columns == {"image": "photo"}


def test_a_speaker_is_on_one_side():
    assert written(corpus()).data[0].group == "speaker"
    rows = [[name, f"the fox {n}", f"p{n % 12}"] for n, name in enumerate(recordings(Path("patients")))]
    path = table(Path("patients/rows.csv"), ["audio", "text", "patient"], rows)
    assert written(path).data[0].group == "patient"


@pytest.mark.parametrize(
    ("name", "other"),
    [("转写内容", "班次"), ("Transkript", "campaign"), ("spoken text", "campaign"), ("Gesagtes", "campaign")],
)
def test_what_was_said_is_the_answer_and_not_a_label_beside_it(name, other):
    rows = [[file, "AB"[n % 2], f"the quick fox number {n}"] for n, file in enumerate(recordings(Path("said")))]
    task = written(table(Path("said/rows.csv"), ["file", other, name], rows)).data[0].task
    assert (task.kind, task.options.text) == ("transcribe", name)


def calls(column: str, people: int) -> Path:
    rows = [[name, f"the fox {n}", f"p{n % people}"] for n, name in enumerate(recordings(Path("spoken")))]
    return table(Path("spoken/rows.csv"), ["audio", "text", column], rows)


@pytest.mark.parametrize("column", ["坐席", "说话人编号", "Speaker ID", "customer_id", "Pat. No", "Patientennummer"])
def test_rows_are_grouped_by_people_however_their_column_is_called(column):
    assert written(calls(column, 12)).data[0].group == column


def test_other_columns_about_people_are_no_groups():
    assert written(calls("Customer Mood", 12)).data[0].group is None


def test_too_few_people_to_hold_out_by_are_named():
    done = cli("init", str(calls("speaker", 4)), "--yes", "--card", "cpu")
    assert "no group: 'speaker' has fewer than 10 values" in done.stdout, done.stdout + done.stderr
    assert "could be the answer" not in done.stdout


def of_twelve(header: str) -> Path:
    """Reviews of twelve people, two each, one without an answer."""
    rows = [[f"{header}{n % 12}", f"review {n} is long enough", "" if n == 5 else LABELS[n % 3]] for n in range(ROWS)]
    return table(Path("reviews.csv"), [header, "text", "label"], rows)


@pytest.mark.parametrize("name", ["Pat. No", "customer", "customer_id", "Kundennummer", "患者姓名", "住院号"])
def test_rows_of_one_person_stay_together(name):
    assert load_recipe(finetune.init(of_twelve(name), card="cpu")).data[0].group == name


@pytest.mark.parametrize("name", ["customer city", "patient age", "user rating"])
def test_a_property_of_a_person_is_no_person(name):
    assert load_recipe(finetune.init(of_twelve(name), card="cpu")).data[0].group is None


def test_a_group_can_be_named():
    assert load_recipe(finetune.init(of_twelve("ward"), card="cpu", group="ward")).data[0].group == "ward"
    with pytest.raises(RecipeError, match="group=bed: there is no such column; there are: 'ward', 'text', 'label'"):
        finetune.init(of_twelve("ward"), card="cpu", group="bed", overwrite=True)


def test_where_all_rows_stay_together_a_larger_share_is_not_proposed(capsys):
    name = pictures(Path("."), 1)[0]
    rows = table(Path("one.csv"), ["image", "label"], [[name, LABELS[n % 3]] for n in range(40)])
    assert app(["init", str(rows), "--yes", "--card", "cpu"], standalone_mode=False) is None
    said = "0 test; none for a test: rows that share media or a group stay together, here 1 set"
    assert said in capsys.readouterr().out


def test_one_number_in_words_is_a_fault_of_its_row_and_does_not_change_the_task():
    rows = [[f"a review, number {n}", "five" if n == 7 else n % 5 + 1] for n in range(148)]
    recipe = load_recipe(finetune.init(table(Path("reviews.csv"), ["review", "rating"], rows), card="cpu"))
    assert recipe.data[0].task.kind == "score" and recipe.data[0].task.options.maximum == 5


def test_a_rating_is_the_answer_before_labels_of_no_known_name():
    rows = [[f"a review, number {n}", ("yes", "no")[n % 2], n % 5 + 1] for n in range(40)]
    path = table(Path("reviews.csv"), ["review", "Clicked?", "Your Rating"], rows)
    assert load_recipe(finetune.init(path, card="cpu")).data[0].task.options.number == "Your Rating"


def test_decimal_commas_are_numbers():
    rows = [[f"an invoice, number {n}", f"{n % 8},50"] for n in range(40)]
    recipe = load_recipe(finetune.init(table(Path("bills.csv"), ["invoice text", "Summe €"], rows), card="cpu"))
    assert recipe.data[0].task.kind == "score"


def test_fields_may_be_in_columns_of_their_own():
    bills = [[name, f"No. {n}", f"{n},50", ("yes", "no")[n % 2]] for n, name in enumerate(pictures(Path("bills")))]
    path = table(Path("bills/bills.csv"), ["scan", "Nummer", "Summe", "bezahlt"], bills)
    task = written(path, task="extract").data[0].task
    assert task.options.answer == "" and task.options.fields == {"Nummer": "text", "Summe": "number", "bezahlt": "text"}


def test_media_named_with_backslashes_are_named_with_the_cure():
    pictures(Path("shop/pics"))
    path = table(Path("shop/shop.csv"), ["image", "label"], [[f"pics\\{n}.png", LABELS[n % 3]] for n in range(ROWS)])
    with pytest.raises(DataError, match="write / between folders"):
        finetune.init(path, card="cpu")


def test_several_texts_stand_before_the_question():
    rows = [[name, f"标题{n}", f"这是第{n}张图", LABELS[n % 3]] for n, name in enumerate(pictures(Path("shop")))]
    table(Path("shop/rows.csv"), ["image", "标题", "正文（原文）", "label"], rows)
    done = cli("init", "shop", "--yes", "--card", "cpu", "--text", "标题", "--text", "正文（原文）")
    assert done.returncode == 0, done.stderr
    assert list(load_recipe(Path("shop.yaml")).data[0].task.options.text) == ["标题", "正文（原文）"]
    with pytest.raises(RecipeError, match=r"text=正文\(原文\): there is no such column. Did you mean '正文（原文）'\?"):
        finetune.init("shop", text="正文(原文)", overwrite=True)


def test_media_that_no_column_names_are_counted():
    recordings(Path("calls/录音"))
    rows = [[n, f"订单{n}，未发货，客户很着急", LABELS[n % 3]] for n in range(ROWS)]
    table(Path("calls/rows.csv"), ["录音编号", "工单信息", "诉求类型"], rows)
    assert f"not used: {ROWS} files of audio, which no column names" in repr(finetune.init("calls", card="cpu"))


def test_a_chinese_table_in_gb18030_gets_chinese_questions_and_an_llm_that_reads_them():
    rows = [[name, f"这是第{n}张方块的图片，颜色很好看"] for n, name in enumerate(pictures(Path("图")))]
    path = table(Path("图/商品.csv"), ["图片", "描述"], rows, encoding="gb18030")
    recipe = written(path, card="8gb", name="goods")
    source = recipe.data[0]
    assert source.format.options.encoding in ("gb18030", "gbk", "gb2312")
    assert source.task.kind == "caption" and source.task.options.prompt == "描述这张图片。"
    assert recipe.model.llm.name.startswith("Qwen/")
    english = written(captions(), card="8gb", name="album")
    assert english.data[0].task.options.prompt == "Describe the picture." and "SmolLM2" in english.model.llm.name


@pytest.mark.parametrize(
    ("texts", "language"),
    [
        (["猫", "狗"], "zh"),
        (["a cat"], "en"),
        (["我要退 iPhone"], "zh"),
        (["ein Mädchen, schön"], ""),
        (["ねこです"], ""),
    ],
)
def test_languages(texts, language):
    assert language_of(texts) == language


def test_semicolons_and_splits_in_files_of_their_own():
    names = pictures(Path("shop/images"))
    rows = [[name, LABELS[n % 3]] for n, name in enumerate(names)]
    table(Path("shop/train.csv"), ["image", "label"], rows[:16], delimiter=";")
    table(Path("shop/val.csv"), ["image", "label"], rows[16:20], delimiter=";")
    table(Path("shop/test.csv"), ["image", "label"], rows[20:], delimiter=";")
    recipe = written(Path("shop"))
    assert [source.split for source in recipe.data] == ["train", "validation", "test"]
    assert recipe.train.validation and not recipe.data[0].hold_out
    assert recipe.data[0].media_folder == Path("shop/images").resolve()
    with pytest.raises(RecipeError, match=r"hold_out=5: write a share above 0, at most 0.9"):
        finetune.init(Path("shop"), hold_out=5, overwrite=True)


def test_tabs_in_a_csv_file_are_its_delimiter():
    rows = [[f"word {n} of many", LABELS[n % 3]] for n in range(ROWS)]
    recipe = written(table(Path("tabs.csv"), ["text", "label"], rows, delimiter="\t"))
    assert recipe.data[0].format.options.delimiter == "\t" and recipe.data[0].task.kind == "classify"


def test_the_run_is_called_after_the_folder_that_was_named():
    rows = [[f"word {n} of many", LABELS[n % 3]] for n in range(ROWS)]
    table(Path("vid/clips-list.csv"), ["text", "label"], rows)
    assert finetune.init("vid", card="cpu").path == Path("vid.yaml")
    assert finetune.init("vid/clips-list.csv", card="cpu").path == Path("clips-list.yaml")


def test_in_python_the_summary_is_shown_and_the_result_stands_for_the_recipe():
    rows = [[f"word {n} of many", LABELS[n % 3]] for n in range(ROWS)]
    result = finetune.init(table(Path("words.csv"), ["text", "label"], rows), card="cpu")
    assert finetune.check(result).recipe == load_recipe("words.yaml") and Path(result) == Path("words.yaml")
    shown = repr(result)
    assert "answer: 'label', label, 3 labels" in shown and "model for the CPU: " in shown
    assert shown.endswith("next: finetune.check('words.yaml'), then finetune.run('words.yaml')")
    assert ">words.csv: format table, columns text, label\n" in result._repr_html_()


def test_an_option_that_is_not_there_is_refused():
    with pytest.raises(TypeError, match="cards"):
        finetune.init(class_folders(), cards="8gb")


def test_there_are_enough_steps_for_few_rows_and_not_too_many_for_many():
    few = written(with_labels()).train
    assert few.tokens_per_batch == 256 and sum(stage.epochs for stage in few.stages) >= 20
    rows = [[n, f"The delivery {n} was " + "late " * 100, LABELS[n % 2]] for n in range(600)]
    many = written(table(Path("many.csv"), ["id", "post", "label"], rows)).train
    assert many.epochs == 2 and many.tokens_per_batch == 1024


def test_media_in_another_folder_are_found_and_others_named():
    rows = [[name, LABELS[n % 3]] for n, name in enumerate(pictures(Path("elsewhere/deep")))]
    path = table(Path("tables/rows.csv"), ["image", "label"], rows)
    with pytest.raises(DataError, match=r"names media such as '0.png', which isn't in .*media_folder="):
        finetune.init(path)
    assert (
        written(path, media_folder=Path("elsewhere/deep")).data[0].folder_of_media == Path("elsewhere/deep").resolve()
    )


def test_several_answers_in_a_cell_are_split_as_they_are_written():
    rows = [[name, "那是什么？", f"方块{n} | 方块{n} | 红{n}"] for n, name in enumerate(pictures(Path("vqa")))]
    path = table(Path("vqa/rows.csv"), ["image", "question", "All answers"], rows)
    task = written(path, answer="All answers").data[0].task
    assert task.kind == "vqa" and task.options.separator == "|"
    few = [[name, "那是什么？", f"{LABELS[n % 3]} | 方块 | 方块"] for n, name in enumerate(pictures(Path("vqa")))]
    path = table(Path("vqa/rows.csv"), ["image", "question", "All answers"], few)
    assert written(path, answer="All answers", overwrite=True).data[0].task.options.separator == "|"


def support(**names: str) -> Path:
    """Calls with dates, staff and unique numbers beside what is to be learned."""
    header = [names.get(name, name) for name in ("Date", "Call Reason", "Agent", "Ticket No", "Transcript")]
    reasons = ("Refund", "Delivery", "Password")
    rows = [
        [f"{n % 9 + 1:02}.01.2024", reasons[n % 3], ("Ann", "Bob")[n // 2 % 2], 10023 + n, f"Caller {n} asks for more"]
        for n in range(ROWS)
    ]
    return table(Path("support.csv"), header, [*rows, ["02.01.2024", "N/A", "Ann", 9000, "Nobody was there"]])


def test_dates_ids_and_staff_are_no_answers_and_other_columns_are_named():
    done = cli("init", str(support()), "--yes", "--card", "cpu")
    assert "answer: 'Call Reason', label, 4 labels" in done.stdout, done.stdout + done.stderr
    assert "; rare: N/A (1)\n" in done.stdout and "fewer than 30 are too few to train and score well" in done.stdout
    assert "other columns that could be the answer: Agent; --answer COLUMN" in done.stdout
    assert load_recipe("support.yaml").data[0].task.options.text == "Transcript"
    renamed = support(**{"Call Reason": "Outcome"})
    assert written(renamed, overwrite=True).data[0].task.options.label == "Outcome"
    assert written(support(), answer="Agent", overwrite=True).data[0].task.options.label == "Agent"


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("Customer Question", "Reply"),
        ("Frage des Kunden", "Antwort"),
        ("问题描述", "客服回复"),
        ("preguntaCliente", "Respuesta"),
    ],
)
def test_the_question_is_found_by_a_word_of_its_name(name, answer):
    rows = [[f"type {n % 2}", f"How do I fix part {n} of it?", f"Turn {n} times, then wait"] for n in range(ROWS)]
    path = table(Path("questions.csv"), ["Question type", name, answer], rows)
    options = written(path).data[0].task.options
    assert (options.question, options.answer) == (name, answer)


def test_labels_of_questions_are_classes_and_a_named_question_is_asked():
    rows = [[f"How do I fix part {n} of it?", LABELS[n % 3]] for n in range(ROWS)]
    path = table(Path("questions.csv"), ["Customer Question", "Topic"], rows)
    task = written(path).data[0].task
    assert task.kind == "classify" and task.options.text == "Customer Question"
    path = table(Path("questions.csv"), ["Body", "Topic"], rows)
    task = written(path, question="Body", overwrite=True).data[0].task
    assert task.kind == "answer" and task.options.question == "Body"


def test_an_encoding_can_be_named():
    rows = [[f"窗{n}", "好" if n % 2 else "大"] for n in range(4)]
    path = table(Path("short.csv"), ["文字", "label"], rows, encoding="big5")
    with pytest.raises(DataError, match="its encoding isn't clear; name it with encoding=, as gb18030"):
        finetune.init(path)
    assert written(path, encoding="big5").data[0].format.options.encoding == "big5"
    with pytest.raises(RecipeError, match="encoding=big6: write an encoding such as"):
        finetune.init(path, encoding="big6")
    with pytest.raises(RecipeError, match=r"encoding=big5: .*products\.xlsx is no CSV"):
        finetune.init(sheet(), encoding="big5")


@pytest.mark.parametrize("name", ["./gone", "shop/gone", "a/b/c"])
def test_a_model_that_is_not_there_leaves_no_recipe(name):
    path = with_labels()
    with pytest.raises(RecipeError, match=f"^{name}: no such file or folder"):
        finetune.init(path, card="cpu", llm=name)
    with pytest.raises(RecipeError, match=f"^{name}: no such file or folder"):
        finetune.init(path, card="cpu", encoders=[name])
    written(path, llm="org/not-here-but-on-the-hub")


def test_an_llm_with_encoders_of_its_own_becomes_the_base(tmp_path, monkeypatch):
    """By the config of a folder, or of the Hub where it can be reached. One without the rows' media is refused."""
    path, config = with_labels(), {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}
    put(tmp_path / "llava" / "config.json", json.dumps(config))
    put(tmp_path / "listens" / "config.json", json.dumps({"architectures": ["Qwen2Audio"], "audio_config": {}}))
    with hub_on_loopback() as hub, asked_of(hub, monkeypatch, tmp_path / "hub"):
        hub.add("someone/llava", tmp_path / "llava")
        for llm in ("someone/llava", str(tmp_path / "llava")):
            recipe = load_recipe(finetune.init(path, card="cpu", llm=llm, overwrite=True).path)
            assert recipe.model.base.name.endswith("llava") and recipe.model.llm is None
            assert not recipe.model.encoders and recipe.train.stages[-1].trains[0] == "adapter"
        with pytest.raises(RecipeError, match="takes audio, and these rows have image"):
            finetune.init(path, card="cpu", llm=str(tmp_path / "listens"), overwrite=True)
        assert [name for _, name in hub.requests if "resolve" in name and "config.json" not in name] == []


def test_a_recipe_that_is_not_valid_is_not_written(monkeypatch):
    path = with_labels()
    monkeypatch.setattr("finetune.commands.init.Draft.text", lambda draft: "name: x\nmodel: 3\n")
    with pytest.raises(RecipeError, match=r"products\.yaml:2: model"):
        finetune.init(path, card="cpu")
    assert not [*Path().glob("*.yaml")] and not [*Path().glob(".*yaml*")]


@pytest.mark.parametrize(
    ("text", "column", "prompt"),
    [
        ("我要退{}号货物", "Call Reason", "这属于哪一类？"),
        ("我要退{}号货物", "来电原因", "来电原因是什么？"),
        ("Send parcel {} back", "Call Reason", "Which Call Reason?"),
        ("Send parcel {} back", "来电原因", "Which category does this belong to?"),
        ("Schönes Päckchen Nummer {} zurück", "Grund", "Which category does this belong to?"),
    ],
)
def test_a_prompt_is_in_one_language(text, column, prompt):
    rows = [[text.format(n), LABELS[n % 3]] for n in range(40)]
    done = cli("init", str(table(Path("calls.csv"), ["text", column], rows)), "--yes", "--card", "cpu")
    assert "too few" not in done.stdout and "rare" not in done.stdout
    assert load_recipe("calls.yaml").data[0].task.options.prompt == prompt


def test_a_question_mark_is_not_doubled():
    rows = [[f"offer {n} at a low price", ("yes", "no")[n % 2]] for n in range(ROWS)]
    recipe = load_recipe(finetune.init(table(Path("offers.csv"), ["offer", "Clicked?"], rows), card="cpu"))
    assert recipe.data[0].task.options.prompt == "Which Clicked?"


def test_a_text_beside_a_recording_is_refused_and_what_is_not_used_is_listed():
    rows = [[name, f"the fox {n}", f"p{n % 12}", "x"] for n, name in enumerate(recordings(Path("said")))]
    path = table(Path("said/rows.csv"), ["audio", "text", "patient", "note"], rows)
    with pytest.raises(RecipeError, match="text=note: the task transcribe reads no text"):
        finetune.init(path, text="note")
    assert "not used: note\n" in cli("init", str(path), "--yes", "--card", "cpu").stdout


@pytest.mark.parametrize("file", ["notes.pdf", "photo.png", None])
def test_a_folder_without_rows_says_what_was_looked_for(file):
    Path("stuff").mkdir()
    if file:
        put(Path("stuff") / file, b"x")
    done = cli("init", "stuff", "--yes")
    assert done.returncode == 2 and "Looked for: a table (.csv, .tsv, .xlsx)" in done.stderr
    assert ("1 " + Path(file).suffix if file else "no files") in done.stderr
    assert ("put them into a folder for each label" in done.stderr) == (file == "photo.png")
    assert not [*Path().glob("*.yaml")]


def test_a_workbook_above_its_folder_of_pictures_is_the_rows_and_the_folder_no_label():
    names = pictures(Path("评论/图片"))
    book = openpyxl.Workbook()
    for row in [["配图：文件名", "情感倾向"], *([name, "正面" if n % 2 else "负面"] for n, name in enumerate(names))]:
        book.active.append(row)
    book.save("评论/评论 2026（最终版）.xlsx")
    put(Path("评论/~$评论 2026（最终版）.xlsx"), b"open in Excel")
    recipe = written(Path("评论"), name="2026")
    assert recipe.name == "2026" and recipe.data[0].columns == {"image": "配图：文件名"}
    assert recipe.data[0].task.options.label == "情感倾向"
    put(Path("评论/旧.xls"), b"\xd0\xcf\x11\xe0")
    with pytest.raises(DataError, match=r"no format recognises it; save it as \.xlsx, or as CSV in UTF-8"):
        finetune.init("评论/旧.xls")


def test_a_folder_of_one_label_teaches_nothing():
    pictures(Path("shop/pictures"))
    with pytest.raises(RecipeError, match="'label' holds only 'pictures', so there is nothing to learn"):
        finetune.init("shop")


def test_an_index_of_datasets_is_no_saved_dataset():
    pictures(Path("lf/图"))
    rows = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "."}]} for n in "ab"]
    put(Path("lf/rows.json"), json.dumps(rows))
    put(Path("lf/dataset_info.json"), json.dumps({"rows": {"file_name": "rows.json"}}))
    with pytest.raises(DataError, match=r"2 files or folders of rows \(dataset_info.json, rows.json\); name one"):
        finetune.init("lf")


def test_conversations_under_another_name_are_read_and_those_of_another_form_named():
    pairs = [(f"订单{n}到哪了？", "已发货。") for n in range(ROWS)]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    put(Path("chat.jsonl"), "\n".join(json.dumps({"dialogue": of_row}) for of_row in turns))
    assert written(Path("chat.jsonl")).data[0].columns == {"messages": "dialogue"}
    put(Path("other.jsonl"), "\n".join(json.dumps({"msgs": [{"from": "a", "text": "b"}]}) for _ in range(ROWS)))
    with pytest.raises(DataError, match=r"got \{'from': 'a', 'text': 'b'\}; so in 23 other rows") as refused:
        finetune.init("other.jsonl")
    assert len(str(refused.value).splitlines()) == 2


def test_a_table_without_an_answer_says_so():
    path = table(Path("shop/rows.csv"), ["image"], [[name] for name in pictures(Path("shop"))])
    with pytest.raises(DataError, match=r"no column could be the answer.*image \(image\)"):
        finetune.init(path)
    path = table(Path("lonely.csv"), ["label"], [[LABELS[n % 3]] for n in range(ROWS)])
    with pytest.raises(RecipeError, match="nothing to ask about"):
        finetune.init(path)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"task": "rank"}, "task=rank: finetune init writes recipes for answer, "),
        ({"task": "score"}, "task=score: column 'shelf' holds label, not number"),
        ({"answer": "price"}, "answer=price: there is no such column; there are: 'photo', 'shelf', 'number'"),
        ({"text": "price"}, "text=price: there is no such column"),
        ({"question": "price"}, "question=price: there is no such column"),
        ({"question": "shelf"}, "question=shelf: that is the answer"),
        ({"task": "classify", "question": "number"}, "question=number: the task classify reads no question"),
        ({"task": "vqa"}, "task=vqa: no column is called question; .* question="),
        ({"hold_out": 0.0}, "hold_out=0: write a share above 0"),
        ({"name": "My Shop"}, "name='My Shop': write small letters"),
        ({"card": "abacus"}, "card=abacus: write one of cpu, "),
        ({"encoders": ["audio=x"]}, "encoders='audio=x': write image=NAME"),
    ],
)
def test_a_choice_that_does_not_fit_is_refused(choices, message):
    with pytest.raises(RecipeError, match=message):
        finetune.init(with_labels(), **{"answer": "shelf", "card": "cpu", **choices})
    assert not [*Path().glob("*.yaml")]


@pytest.mark.parametrize(
    ("rows", "model_type", "message"),
    [
        (clips, "whisper", "is a whisper, which isn't known as an encoder of video"),
        (with_labels, "wav2vec2", "is a wav2vec2, .* of image"),
        (with_labels, "videomae", "is a videomae, .* of image"),
        (transcripts, "siglip", "is a siglip, .* of audio"),
    ],
)
def test_an_encoder_of_another_medium_is_refused(rows, model_type, message):
    put(Path("encoder/config.json"), {"model_type": model_type})
    with pytest.raises(RecipeError, match=message):
        finetune.init(rows(), card="cpu", encoders=["./encoder"])


def test_a_task_chooses_the_column_that_fits_it():
    path = with_labels()
    assert written(path, task="score").data[0].task.options.number == "number"
    assert written(path, overwrite=True).data[0].task.options.prompt == "Which shelf?"


def test_it_overwrites_only_if_asked():
    path = with_labels()
    written(path)
    with pytest.raises(RecipeError, match=r"products\.yaml exists already; .* name= or out=, or give overwrite=True"):
        finetune.init(path, card="cpu")
    assert written(path, overwrite=True, prompt="Which shelf?").data[0].task.options.prompt == "Which shelf?"


def test_rows_that_cannot_be_used_are_listed_with_the_command_that_removes_them():
    rows = [[name, LABELS[n % 3]] for n, name in enumerate(pictures(Path("shop")))]
    table(Path("shop/rows.csv"), ["image", "label"], [*rows, ["gone.png", "red"], ["0.png", ""]])
    done = cli("init", "shop", "--yes", "--card", "t4")
    assert done.returncode == 0, done.stderr
    assert "2 rows can't be used" in done.stdout and "rows.csv:26: no such image" in done.stdout
    assert "next: finetune data check shop.yaml --fix cleaned" in done.stdout
    assert load_recipe("shop.yaml").model.llm.dtype == "float16"


def test_rows_that_the_format_refuses_are_listed_too_and_a_file_of_nothing_else_is_an_error():
    turns = [[{"from": "human", "value": f"<image>{n}?"}, {"from": "gpt", "value": "."}] for n in range(ROWS)]
    rows = [{"image": name, "conversations": said} for name, said in zip(pictures(Path("lf")), turns, strict=True)]
    rows[4]["conversations"] = turns[4][1:]
    rows[5]["conversations"] = [{"from": "用户", "value": "?"}]
    result = finetune.init(put(Path("lf/rows.json"), rows), card="cpu")
    assert [line.split(":")[1] for line in result.wrong] == ["5", "6"] and "18 train, 4 test" in repr(result)
    with pytest.raises(DataError, match=r"broken.json:1: conversations.0: 'from' is '用户'"):
        finetune.init(put(Path("lf/broken.json"), [rows[5]] * 3), card="cpu")


def test_without_a_terminal_it_needs_yes():
    done = cli("init", str(with_labels()))
    assert done.returncode == 2 and "add --yes" in done.stderr


def test_it_asks_at_most_five_questions_and_again_after_a_wrong_answer(monkeypatch):
    path = with_labels()
    monkeypatch.setattr("typer.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    answers = "nothing\nshelf\nWhich shelf?\nshop\n10\n0.3\n"
    done = typer.testing.CliRunner().invoke(app, ["init", str(path)], input=answers)
    assert done.exit_code == 0, done.output
    assert done.output.count("]: ") == 6 and "there is no such column" in done.output
    recipe = load_recipe("shop.yaml")
    assert recipe.data[0].task.options.prompt == "Which shelf?" and recipe.data[0].hold_out == 0.3
    assert "8 GB" in Path("shop.yaml").read_text()


@pytest.mark.parametrize("name", cards.NAMES)
def test_every_card_has_a_recipe(name):
    recipe = written(with_labels(), card=name)
    grid = {"google/siglip-base-patch16-224": 14, "google/siglip2-base-patch16-384": 24}
    side = grid.get(recipe.model.encoders["image"].options.name, 27)
    assert recipe.model.projectors["image"].length(side**2) <= 81
    assert recipe.model.llm.dtype == ("float16" if name == "t4" else "auto")


@pytest.mark.parametrize(
    ("memory", "name"),
    [
        ("6", "cpu"),
        ("10gb", "8gb"),
        ("16", "16gb"),
        ("80 GB", "24gb"),
        ("T4", "t4"),
        ("3060", "12gb"),
        ("rtx3060-12gb", "12gb"),
        ("RTX 4090", "24gb"),
        ("L4", "24gb"),
    ],
)
def test_a_card_by_its_memory(memory, name):
    assert cards.card_of(memory).name == name


@pytest.mark.parametrize("name", ["5090", "x", "rtx", "gb", "201 GB"])
def test_a_card_that_is_neither_a_name_nor_a_memory_is_refused(name):
    with pytest.raises(RecipeError, match="rtx3060-12gb"):
        cards.card_of(name)


def test_the_parts_are_those_of_the_recipes_for_the_same_cards():
    recipes = {"t4": "colab-t4", "8gb": "gpu-8gb", "12gb": "read-documents", "16gb": "gpu-16gb"}
    root = Path(__file__).parents[2] / "recipes"
    for name, recipe in recipes.items():
        text, card = (root / f"{recipe}.yaml").read_text(encoding="utf-8"), cards.card_of(name)
        for part in (card.english or card.llm, card.vision):
            assert f"name: {part.name}\n" in text and f"revision: {part.revision}\n" in text, (name, part)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a.jpg", "b.JPG"], "image"),
        (["https://example.com/a.mp3?x=1"], "audio"),
        (["1", "2.5", "-3e4"], "number"),
        (["[1, 2, 3, 4]", "5,6,7,8", ".1 .2 .5 .6", "1e-05, 0.2, 0.5, 1."], "boxes"),
        (["x1", "x2", "x3"], "id"),
        (["", None], "empty"),
        (["yes", "no"] * 9, "label"),
        (["2024-01-03", "2024-1-4 10:30:00", "20240105"], "date"),
        (["3.1.24", "14/02/2024", "2024年3月1日", "3. März 2024", "Jan 5, 2024"], "date"),
        (["1.5", "2.5", "20"], "number"),
        (["x1", "x2", "x3", "x4"] * 2 + [f"y{n}" for n in range(80)], "id"),
        ([f"sentence number {n} is long" for n in range(9)], "text"),
    ],
)
def test_columns(values, kind):
    (column,) = describe_columns([{"column": value} for value in values])
    assert column.kind == kind


@pytest.mark.slow
def test_the_recipe_trains():
    tiny_llm_folder(Path("weights/llm"))
    tiny_vision_folder(Path("weights/vision"))
    tiny_audio_folder(Path("weights/whisper"))
    path, folders = two_media(), ["image=weights/vision", "audio=weights/whisper"]
    recipe = finetune.init(path, card="cpu", llm="weights/llm", encoders=folders)
    run = finetune.train(load_recipe(recipe, ["train.stages.0.epochs=1", "train.stages.1.epochs=1"]), Path("run"))
    assert run is not None and (Path("run") / "adapter").is_dir()


@pytest.mark.parametrize(
    ("name", "replies", "kind"),
    [
        ("reply", ["Sorry, your shoes are on the way.", "We have cancelled the order of your shoes."], "answer"),
        ("回复", ["好的，鞋子的地址可以修改。", "好的，衣服的订单已取消。"], "answer"),
        ("reply", ["yes", "not today"], "classify"),
        ("label", ["Sorry, your shoes are on the way.", "We have cancelled the order of your shoes."], "classify"),
    ],
)
def test_few_sentences_that_are_called_replies_are_written_not_chosen(name, replies, kind):
    rows = [[file, replies[n % 2]] for n, file in enumerate(recordings(Path("calls")))]
    recipe = written(table(Path("calls/calls.csv"), ["audio", name], rows))
    assert recipe.data[0].task.kind == kind
