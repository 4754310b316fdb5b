import io
import json
import random

import pytest
from tiny_formats import put

from finetune.common.errors import DataError
from finetune.data.formats import _json


def anything(draw: random.Random, depth: int = 0):
    text = "".join(draw.choice('ab\\"\n{}[],:红🙂é ') for _ in range(draw.randrange(30)))
    number = draw.choice([0, -1, 12345678901, 1.5, -2e-300, 1e22, True, False, None])
    if depth == 3 or draw.random() < 0.3:
        return draw.choice([text, number])
    inside = [anything(draw, depth + 1) for _ in range(draw.randrange(4))]
    return inside if draw.random() < 0.5 else {f"{text}{n}": value for n, value in enumerate(inside)}


@pytest.mark.parametrize("chunk", [1, 3, 17, 2**16])
def test_values_are_those_of_the_json_module_however_the_text_is_cut(chunk, monkeypatch):
    monkeypatch.setattr(_json, "CHUNK", chunk)
    draw = random.Random(chunk)
    for _ in range(60):
        values = [anything(draw) for _ in range(draw.randrange(6))]
        style = {"indent": draw.choice([None, 2]), "ensure_ascii": draw.random() < 0.5}
        text = json.dumps(values, **style)
        assert list(_json.Scanner(io.StringIO(text)).elements()) == values
        scanner = _json.Scanner(io.StringIO(json.dumps({str(n): value for n, value in enumerate(values)}, **style)))
        assert [(key, scanner.value()) for key in scanner.members()] == [(str(n), v) for n, v in enumerate(values)]


def test_changed_texts_are_read_as_the_json_module_does_or_refused(tmp_path):
    draw = random.Random(0)
    refused = 0
    for _ in range(400):
        text = list(json.dumps([{"a": anything(draw)} for _ in range(3)]))
        for _ in range(draw.randrange(1, 3)):
            text[draw.randrange(len(text))] = draw.choice('"{}[],:\\1e-x')
        path = put(tmp_path / "x.json", "".join(text))
        try:
            expected = json.loads("".join(text))
        except ValueError:
            expected = None
        try:
            found = [value for _, value in _json.array_of(path)]
        except DataError:
            refused += 1
            assert not isinstance(expected, list)
        else:
            assert found == expected
    assert refused > 100


def test_an_array_under_a_key_is_found_behind_others(tmp_path):
    path = put(tmp_path / "x.json", {"info": {"b": [9]}, "b": [1, 2], "c": [3]})
    assert list(_json.array_of(path, "b")) == [(1, 1), (2, 2)] and list(_json.array_of(path, "d")) == []
    with pytest.raises(DataError, match=r"x.json:1: not JSON after element 0 in 'info' \('{' instead of \[\)"):
        list(_json.array_of(path, "info"))
