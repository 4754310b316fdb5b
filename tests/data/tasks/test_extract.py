import json

import pytest
from task_rows import Asked

from finetune.common.errors import DataError
from finetune.data.sample import Answer

FIELDS = {
    "total": "number",
    "paid": "boolean",
    "currency": ["EUR", "元"],
    "tags": "list",
    "供应商": "text",
    "lines": {"name": "text", "price": "number"},
}
RIGHT = {
    "total": 12.5,
    "paid": True,
    "currency": "元",
    "tags": ["a", "b"],
    "供应商": "好 公司",
    "lines": [{"name": "茶", "price": 2}, {"name": "cup", "price": 10.5}],
}


def test_the_fields_are_asked_for_and_written_in_their_order(tmp_path):
    asked = Asked("extract", tmp_path, fields=FIELDS, prompt="填写：")
    shuffled = json.dumps(dict(reversed(RIGHT.items())))
    for given in (shuffled, RIGHT):
        sample = asked.sample(json=given)
        assert sample.target == RIGHT and json.loads(sample.answer) == RIGHT and "好 公司" in sample.answer
        assert list(json.loads(sample.answer)) == list(FIELDS)
    prompt, fields = asked.question(json=RIGHT).split("\n")
    assert prompt == "填写：" and json.loads(fields) == FIELDS


def test_fields_may_be_columns(tmp_path):
    asked = Asked("extract", tmp_path, fields=FIELDS, answer="")
    lines = json.dumps(RIGHT["lines"])
    columns = {"total": "12.50", "paid": "是", "currency": "元", "tags": "a; b", "供应商": "好 公司", "lines": lines}
    assert asked.sample(**columns).target == RIGHT
    empty = asked.sample(**dict.fromkeys(columns, " "))
    assert empty.target == dict.fromkeys(FIELDS) and asked.scores((empty, empty.answer)) == {
        "json_valid": 1.0,
        "schema_valid": 1.0,
        "exact_match": 1.0,
    }
    for wrong in (
        {"total": "much"},
        {"paid": "perhaps"},
        {"currency": "USD"},
        {"lines": "tea"},
        {"lines": '[{"name": 3}]'},
    ):
        with pytest.raises(DataError, match=r"rows\.csv:2: .*" + next(iter(wrong))):
            asked.sample(**{**columns, **wrong})
    with pytest.raises(DataError, match="column 'total' is missing"):
        asked.sample(paid="yes")


@pytest.mark.parametrize(
    "wrong", ["", "no", "[1]", None, 3, "{", '{"a": NaN}', '{"a": 1e999}', '{"a": ' + "[" * 30 + "]" * 30 + "}"]
)
def test_what_is_no_json_object_for_everyone_is_refused(tmp_path, wrong):
    with pytest.raises(DataError, match=r"rows\.csv:2: "):
        Asked("extract", tmp_path).sample(json=wrong)


def test_rows_that_do_not_fit_the_fields_are_refused(tmp_path):
    asked = Asked("extract", tmp_path, fields=FIELDS)
    for wrong in (
        {"total": "12"},
        {"paid": 1},
        {"currency": "USD"},
        {"tags": "a"},
        {"more": 1},
        {"lines": [{"name": "x"}]},
    ):
        with pytest.raises(DataError, match=rf"rows\.csv:2: field '{next(iter(wrong))}'"):
            asked.sample(json={**RIGHT, **wrong})
    with pytest.raises(DataError, match=r"rows\.csv:2: field 'total' is missing"):
        asked.sample(json={key: value for key, value in RIGHT.items() if key != "total"})


@pytest.mark.parametrize(
    "text, found",
    [
        ('{"a": 1}', {"a": 1}),
        ('Here {it} is:\n```json\n{"a": [1, "}"]}\n```\nGood?', {"a": [1, "}"]}),
        ('结果：{"名": "猫"}。', {"名": "猫"}),
        *[
            (text, None)
            for text in ("", "[1]", "{", '{"a": NaN}', '{"a": 1e999}', "{'a': 1}", '{"a":' * 5000, "[" * 5000)
        ],
    ],
)
def test_the_first_object_is_read(tmp_path, text, found):
    assert Asked("extract", tmp_path).read(text) == found


def test_fields_are_counted_value_by_value(tmp_path):
    asked = Asked("extract", tmp_path, fields=FIELDS)
    sample = asked.sample(json=RIGHT)
    values = 1 + 1 + 1 + 2 + 1 + 4
    half = {
        **RIGHT,
        "total": 12,
        "tags": ["b", "c", "d"],
        "供应商": " 好  公司",
        "lines": RIGHT["lines"][:1],
        "paid": None,
    }
    scores = asked.scores((sample, json.dumps(half)))
    assert scores["field_f1"] == pytest.approx(2 * 5 / (values + 8))  # currency, b, the company, tea and its price
    assert scores["schema_valid"] == 1.0 and scores["exact_match"] == 0.0
    scores = asked.scores((sample, json.dumps({**RIGHT, "total": "12.5"})), (sample, "no JSON"))
    assert scores["json_valid"] == 0.5 and scores["schema_valid"] == 0.0
    assert scores["field_f1"] == pytest.approx(2 * 9 / (3 * values))
    table = asked.task.tables([asked.row(sample, Answer(json.dumps(half)))], asked.options)["per_label"]
    assert list(table) == list(FIELDS) and table["tags"]["support"] == 2
    assert table["tags"]["precision"] == pytest.approx(1 / 3) and table["tags"]["recall"] == 0.5
    assert table["paid"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}


def test_numbers_are_numbers_however_they_are_written(tmp_path):
    asked = Asked("extract", tmp_path)
    sample = asked.sample(json='{"a": 10, "b": true, "c": "1"}')
    assert asked.scores((sample, '{"c": "1", "b": true, "a": 10.0}'))["exact_match"] == 1.0
    assert asked.scores((sample, '{"a": "10", "b": 1, "c": 1}'))["field_f1"] == 0.0
    assert asked.scores((sample, '{"a": 1' + "0" * 400 + "}"))["field_f1"] == 0.0


def test_columns_need_fields(tmp_path):
    with pytest.raises(ValueError, match="fields"):
        Asked("extract", tmp_path, answer="")
