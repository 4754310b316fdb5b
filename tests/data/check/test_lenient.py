import json

import pytest
from tiny import part

from finetune.common.errors import DataError
from finetune.data.check.lenient import encoding_of, lenient_rows
from finetune.recipe.schema import Source


def read(path, task="classify"):
    told = []
    rows = list(lenient_rows(Source(path=path, task=part("tasks", task)), lambda *what: told.append(what), 10**6))
    return rows, told


def test_a_table_goes_on_behind_each_broken_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('image,label\na.png,red\nb.png,red,more\nc.png,blue\nd.png,"open\ne.png,green\n\nf.png,"a\nb"\n')
    rows, told = read(path)
    assert [(row.number, row.columns["image"]) for row in rows] == [
        (2, "a.png"),
        (4, "c.png"),
        (6, "e.png"),
        (9, "f.png"),  # its field of two lines ends there
    ]
    assert rows[-1].columns["label"] == "a\nb"
    assert [(number, line) for number, _, line in told] == [(3, "b.png,red,more"), (5, 'd.png,"open')]
    assert all(row.path == path and row.media_folder == tmp_path for row in rows)


def test_a_sound_file_is_read_as_its_format_reads_it(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("image,label\n" + "".join(f"{n}.png,red\n" for n in range(200)))
    rows, told = read(path)
    assert [row.number for row in rows] == list(range(2, 202)) and not told


def test_semicolons_for_commas_are_one_fault_though_numbers_have_commas(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("image;total\n" + "".join(f"{n}.png;{n},00\n" for n in range(50)))
    rows, told = read(path)
    assert not rows and len(told) == 1 and "delimiter: ';'" in told[0][1]


@pytest.mark.parametrize("array", [False, True])
def test_json_goes_on_behind_each_broken_row(tmp_path, array):
    good = [{"image": f"{n}.png", "label": "红"} for n in range(150)]
    lines = [json.dumps(row, ensure_ascii=False) for row in good]
    for number in (3, 4, 90):
        lines[number - 1] = "[1, 2]"
    if not array:
        lines[139] = '{"image": '
    path = tmp_path / ("rows.json" if array else "rows.jsonl")
    path.write_text("[" + ",".join(lines) + "]" if array else "\n".join(lines), encoding="utf-8")
    rows, told = read(path)
    broken = [3, 4, 90] if array else [3, 4, 90, 140]
    assert [number for number, _, _ in told] == broken
    assert [row.number for row in rows] == [n for n in range(1, 151) if n not in broken]
    assert all(row.columns["image"] == f"{row.number - 1}.png" for row in rows)
    assert told[2][1].startswith(f"{path.name}:90: ")


def test_a_conversation_whose_markers_do_not_fit_is_one_row(tmp_path):
    turns = [{"role": "user", "content": "<image> what?"}, {"role": "assistant", "content": "a cat"}]
    rows = [
        {"messages": turns, "image": "a.png"},
        {"messages": turns, "image": []},
        {"messages": turns, "image": "b.png"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found, told = read(path, "chat")
    assert [row.number for row in found] == [1, 3]
    assert [number for number, _, _ in told] == [2]


PAGE = "我家门口有一个小公园，每天早上都有很多人在那里散步、打球、聊天。"


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("gb18030", "图片,标签\n" + "".join(f"{PAGE}{n},猫\n" for n in range(20))),
        (
            "gb18030",
            "编号,问题,类别\n" + "".join(f"{n},电池无法充电怎么办,售后\n{n},发票抬头写错,财务\n" for n in range(9)),
        ),
        (
            "gb18030",
            "序号,评论内容,倾向\n"
            + "".join(f"{n},孩子特别喜欢～,正面\n{n},等了三天都没发货～,负面\n{n},快递很快～,正面\n" for n in range(9)),
        ),
        (
            "big5",
            "編號,問題,類別\n" + "".join(f"{n},電池無法充電怎麼辦,售後\n{n},發票抬頭寫錯,財務\n" for n in range(9)),
        ),
        ("cp1251", "image,label\nпривет мир как дела,красный\nсегодня хорошая погода,синий\n"),
        ("utf-16", "image,label\n一只猫,猫\n"),
        ("utf-8-sig", "image,label\n一只猫,猫\n"),
    ],
)
def test_an_encoding_is_detected(tmp_path, encoding, text):
    path = tmp_path / "rows.csv"
    path.write_bytes(text.encode(encoding))
    assert path.read_bytes().decode(encoding_of(path)) == text


def test_a_damaged_line_of_utf_8_stays_utf_8(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("image,label\n一.png,猫\n二.png,狗\n".encode() + b"c.png,\xe9\xb1\n")
    rows, told = read(path)
    assert [row.columns["label"] for row in rows] == ["猫", "狗", "\ufffd"] and not told


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "image,label\na.png,château\n"),
        ("gb18030", "image,label\na.png,窗边\n"),
        ("shift_jis", "画像,猫\n"),
        ("euc_kr", "".join(f"{n},환불,배송\n" for n in range(20))),
        ("euc_jp", "".join(f"{n},修理,配送,返金\n" for n in range(20))),
    ],
)
def test_an_unclear_encoding_is_not_guessed(tmp_path, encoding, text):
    path = tmp_path / "rows.csv"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match="save it as UTF-8, or name the encoding"):
        encoding_of(path)
    rows, told = read(path)
    assert not rows and [number for number, _, _ in told] == [0] and "save it as UTF-8" in told[0][1]


def test_a_file_from_chinese_windows_is_read_and_reported(tmp_path):
    path = tmp_path / "rows.csv"
    texts = [f"{PAGE}第{n}张图" for n in range(20)]
    path.write_bytes(("image,label\n" + "".join(f"{n}.png,{text}\n" for n, text in enumerate(texts))).encode("gb18030"))
    rows, told = read(path)
    assert [row.columns["label"] for row in rows] == texts
    assert [number for number, _, _ in told] == [0] and "gb18030" in told[0][1]


def test_a_file_of_no_format_is_told_once(tmp_path):
    path = tmp_path / "rows.docx"
    path.write_bytes(b"PK")
    rows, told = read(path)
    assert not rows and len(told) == 1 and told[0][0] == 0
