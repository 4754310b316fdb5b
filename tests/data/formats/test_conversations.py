"""The formats of conversations: llava, sharegpt and messages."""

import base64
import json

import pytest
import tiny_formats
from tiny import part
from tiny_formats import put, turns

from finetune.common.errors import DataError
from finetune.data.formats import llava, messages, sharegpt
from finetune.data.rows import read_splits
from finetune.data.sample import Medium
from finetune.recipe.schema import Source

FORMATS = {"llava": llava, "sharegpt": sharegpt, "messages": messages}


def read(format_name, path):
    part = FORMATS[format_name]
    return list(part.rows(path, part.Options()))


def one(format_name, item, tmp_path):
    """The messages of one item, as text and (kind, value)."""
    ((_, row),) = read(format_name, put(tmp_path / "x.json", [item]))
    contents = [(m["role"], m["content"]) for m in row["messages"]]
    return [
        (role, said if isinstance(said, str) else [list(part.values()) for part in said]) for role, said in contents
    ]


def spoken(*values):
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


def test_media_stand_where_their_markers_do(tmp_path):
    said = spoken("<image>\nbefore, <image> after.\n<audio>", "Hm, <image>?", "And <video>")
    item = {"image": ["a.png", "b.png"], "audio": "c.wav", "video": ["d.mp4"], "conversations": said}
    assert one("llava", item, tmp_path) == [
        (
            "user",
            [
                ["image", "a.png"],
                ["text", "before, "],
                ["image", "b.png"],
                ["text", " after."],
                ["audio", "c.wav"],
            ],
        ),
        ("assistant", "Hm, <image>?"),
        ("user", [["text", "And "], ["video", "d.mp4"]]),
    ]


@pytest.mark.parametrize(
    ("name", "item", "message"),
    [
        ("llava", {"image": "a.png", "conversations": spoken("What?", "x")}, "1 of the media .* no marker <image>"),
        ("llava", {"image": "a.png", "conversations": spoken("<image><image>", "x")}, "conversations.0: more markers"),
        ("llava", {"image": "", "conversations": spoken("<image>", "x")}, "more markers <image>"),
        ("llava", {"image": "a", "conversations": spoken("<image><video>", "x")}, "more markers <video>"),
        ("llava", {"image": "a"}, "'conversations' is 'None', not a list"),
        ("llava", {"conversations": ["x"]}, "a turn is {'from': who"),
        ("sharegpt", {"conversations": spoken("<image>", "x")}, "more markers <image> than media"),
        ("sharegpt", {"conversations": [{"from": "nobody", "value": "x"}]}, "'from' is 'nobody'; write one of human"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "{}"}]}, "tool calls"),
        ("sharegpt", {"conversations": [{"from": ["human"], "value": "x"}]}, "'from' is"),
        ("sharegpt", {"conversations": spoken("x", 3)}, "conversations.1: a turn is"),
        ("sharegpt", {"system": "a", "conversations": [{"from": "system", "value": "b"}]}, "keep one"),
        ("messages", {"images": ["a"], "messages": turns("user", "What?", "x")}, "no marker <image>"),
        ("messages", {"messages": turns("user", [{"type": "image"}], "x")}, "messages.0: a part .* no medium for it"),
        ("messages", {"messages": turns("user", [{"type": "image_url"}], "x")}, "'image_url' without its url"),
        ("messages", {"messages": turns("user", [{"type": "input_audio"}], "x")}, "without its data"),
    ],
)
def test_what_does_not_fit_names_file_and_row(name, item, message, tmp_path):
    fine = {"conversations": spoken("a", "b")} if name != "messages" else {"messages": turns("user", "a", "b")}
    path = put(tmp_path / "x.json", [fine, item])
    with pytest.raises(DataError, match=rf"^x\.json:2: .*{message}"):
        read(name, path)


def test_sharegpt_has_many_names_for_two_speakers_and_a_system(tmp_path):
    said = [{"from": "user", "value": "a <video> tag"}, {"from": "assistant", "value": "b"}]
    said += [{"role": "human", "content": "c"}, {"from": "chatgpt", "value": "d"}]
    expected = [("user", "a <video> tag"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert one("sharegpt", {"conversations": said}, tmp_path) == expected
    with_system = one("sharegpt", {"conversations": said, "system": "Kurz."}, tmp_path)
    assert with_system == [("system", "Kurz."), *expected]
    item = {"conversations": spoken("<image>x", "y"), "images": ["a.png"]}
    assert one("sharegpt", item, tmp_path)[0] == ("user", [["image", "a.png"], ["text", "x"]])


def test_parts_of_the_openai_api_become_parts_of_the_task(tmp_path):
    content = [
        {"type": "text", "text": "Look:"},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
        {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "mp3"}},
        {"type": "video_url", "video_url": {"url": "https://example.com/a.mp4"}},
        {"type": "image", "image": "b.png"},
        {"type": "image", "image": None},
        {"type": "odd"},
    ]
    item = {"messages": turns("user", content, "x"), "images": ["c.png"]}
    assert one("messages", item, tmp_path)[0][1] == [
        ["text", "Look:"],
        ["image", "a.png"],
        ["audio", "data:audio/mp3;base64,QUJD"],
        ["video", "https://example.com/a.mp4"],
        ["image", "b.png"],
        ["image", "c.png"],
        ["odd"],
    ]
    item = {"messages": turns("user", "<image>x", "y"), "images": ["a.png"]}
    assert one("messages", item, tmp_path)[0][1] == [["image", "a.png"], ["text", "x"]]


def test_a_picture_held_by_a_message_is_seen_by_the_task_chat(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    picture = tiny_formats.picture()
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    put(tmp_path / "a.png", picture)
    held, named = ({"url": url}, {"url": "a.png"})
    lines = [{"messages": turns("user", [{"type": "image_url", "image_url": u}], "red")} for u in (held, named)]
    path = put(tmp_path / "x.jsonl", "\ufeff" + "\n\n".join(map(json.dumps, lines)))
    samples = read_splits([Source(path=path, task=part("tasks", "chat"))], 0).train
    assert [sample.where for sample in samples] == ["x.jsonl:1", "x.jsonl:3"]
    media = [sample.media[0] for sample in samples]
    assert media[1] == Medium("image", (tmp_path / "a.png").resolve())
    assert media[0].path.read_bytes() == picture and media[0].path.suffix == ".png"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
@pytest.mark.parametrize("layout", ["lines", "array", "indented"])
def test_rows_stand_in_lines_or_in_an_array_whatever_the_suffix(name, layout, tmp_path):
    items = [{"question": f"红 {n}", "n": 1.5, "deep": {"a": [n]}} for n in range(50)]
    text = {
        "lines": "\n".join(json.dumps(item, ensure_ascii=False) for item in items),
        "array": json.dumps(items),
        "indented": json.dumps(items, indent=2),
    }[layout]
    path = put(tmp_path / name, text)
    assert messages.detects(path) and not llava.detects(path) and not sharegpt.detects(path)
    found = read("messages", path)
    assert [row for _, row in found] == items and [number for number, _ in found] == list(range(1, 51))


def test_formats_are_told_apart_by_rows_behind_the_first(tmp_path):
    plain, seen = {"conversations": spoken("a", "b")}, {"image": "a.png", "conversations": spoken("<image>", "b")}
    for name, text in (
        ("a.json", json.dumps([plain, seen])),
        ("a.jsonl", f"{json.dumps(plain)}\n{json.dumps(seen)}\n"),
    ):
        path = put(tmp_path / name, text)
        assert llava.detects(path) and not sharegpt.detects(path) and not messages.detects(path)
    long = {"messages": turns("user", "x" * 2**21, "y"), "images": []}
    path = put(tmp_path / "long.jsonl", json.dumps(long))
    assert messages.detects(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", ":1: not JSON"),
        ('{"a": 1}\n{"a": \n', ":2: not JSON"),
        ('[{"a": 1}, {"a": ', ":2: not JSON"),
        ('[{"a": 1}, 3]', ":2: a int, not an object"),
        ('{\n "a": 1\n}', ":1: not JSON .*an object per line, or one array"),
        (b'{"a": "\xff"}', ":1: not JSON"),
        (b'[{"a": "\xff"}]', ":1: not JSON"),
        ("[" * 100_000, ":1: "),
        ('{"a":' * 100_000, ":1: not JSON"),
    ],
)
def test_what_is_not_json_is_named_by_its_row(name, content, message, tmp_path):
    path = put(tmp_path / name, content)
    assert messages.detects(path)
    with pytest.raises(DataError, match=rf"{name}{message}"):
        read("messages", path)


def test_a_large_array_is_never_held_whole(tmp_path):
    import tracemalloc

    item = {"conversations": spoken("x" * 1000, "y"), "image": ""}
    with (tmp_path / "x.json").open("w") as file:
        file.write("[" + ",".join([json.dumps(item)] * 8000) + "]")
    tracemalloc.start()
    assert llava.detects(tmp_path / "x.json")
    assert sum(1 for _ in llava.rows(tmp_path / "x.json", llava.Options())) == 8000
    peak = tracemalloc.get_traced_memory()[1]
    text = (tmp_path / "x.json").read_text()
    put(tmp_path / "wrong.json", text[:1] + "!" + text[1:])
    del text
    tracemalloc.reset_peak()
    with pytest.raises(DataError, match=r"wrong.json:1: not JSON"):
        read("llava", tmp_path / "wrong.json")
    peak = max(peak, tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert peak < 4 * 2**20 < (tmp_path / "x.json").stat().st_size


def test_alpacas_rows_become_the_conversations_that_llama_factory_makes_of_them(tmp_path):
    row = {"instruction": "<image>写报告。", "input": "男，44岁", "output": "正常。", "images": ["a.png"]}
    asked = ["image", "a.png"], ["text", "写报告。\n男，44岁"]
    assert one("messages", row, tmp_path) == [("user", [*asked]), ("assistant", "正常。")]
    before = {"system": "你是医生", "history": [["你好", "您好"]]}
    assert one("messages", row | before, tmp_path) == [
        *[("system", "你是医生"), ("user", "你好"), ("assistant", "您好")],
        *[("user", [*asked]), ("assistant", "正常。")],
    ]
    unmarked = {"instruction": "写报告。", "output": "正常。", "image": "a.png"}
    assert one("messages", unmarked, tmp_path)[0] == ("user", [["image", "a.png"], ["text", "写报告。"]])
    ((_, pair),) = read("messages", put(tmp_path / "x.json", [row | {"chosen": "肺炎。", "rejected": "正常。"}]))
    assert (pair["messages"][-1]["content"], pair["rejected"]) == ("肺炎。", "正常。")
    with pytest.raises(DataError, match=r"x.json:1: 'history' is a list of \[question, answer\]; got 你好"):
        one("messages", row | {"history": "你好"}, tmp_path)
