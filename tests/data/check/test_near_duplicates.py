from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from finetune.data.check.compare import NEAR_BITS, compare, near_pairs
from finetune.data.check.inspect import View
from finetune.data.check.ledger import Examined, Ledger


@pytest.fixture
def ledger(tmp_path):
    opened = Ledger(tmp_path / "ledger.sqlite", ["rows.csv"])
    yield opened
    opened.close()


def row(number, split="train", content=b"", question=b"", label="", digest=b"", hashed=b"", path=""):
    content = content or bytes([number])
    media = [View("image", path or f"{number}.png", digest or bytes([number]), hashed, bytes(768))]
    labels = (label,) if label else ()
    asked = "classify" if label else ""
    return Examined(number, 0, number + 2, split, content, question or content, 10, label, asked, labels, media)


def found(ledger, code):
    compare(ledger)
    return [(finding.number, finding.text) for finding in ledger.findings(code)]


@pytest.mark.parametrize("count", [60, 1500])
def test_pairs_are_those_that_comparing_all_with_all_finds(ledger, count):
    chance = np.random.default_rng(0)
    base = chance.integers(0, 256, (count // 3, 16), np.uint8)
    hashes = [base]
    for _ in range(2):  # each again, with up to eight bits flipped
        flipped = base.copy()
        for one in flipped:
            for bit in chance.integers(0, 128, chance.integers(0, 9)):
                one[bit // 8] ^= 1 << (bit % 8)
        hashes.append(flipped)
    hashed = np.concatenate(hashes)
    digests = [number.to_bytes(2, "big") for number in range(len(hashed))]
    ledger.base.executemany(
        "insert into media values (?, ?, ?)",
        [(d, h.tobytes(), bytes(768)) for d, h in zip(digests, hashed, strict=True)],
    )
    found = list(near_pairs(ledger))
    pairs = {(left, right): bits for left, right, bits in found}
    assert len(pairs) == len(found)  # each once
    distances = np.bitwise_count(hashed[:, None] ^ hashed[None]).sum(-1)
    seen: dict[bytes, int] = {}
    firsts = [number for number, one in enumerate(hashed) if seen.setdefault(one.tobytes(), number) == number]
    expected = {(digests[a], digests[b]) for a, b in combinations(firsts, 2) if distances[a, b] <= NEAR_BITS}
    expected |= {(digests[seen[one.tobytes()]], digests[n]) for n, one in enumerate(hashed) if n not in firsts}
    assert set(pairs) == expected and len(expected) > count // 4
    assert all(bits == distances[int.from_bytes(a), int.from_bytes(b)] for (a, b), bits in pairs.items())


def test_pictures_whose_colours_differ_are_not_alike(ledger):
    ledger.base.execute("insert into media values (x'01', ?, ?)", (bytes(16), bytes(768)))
    ledger.base.execute("insert into media values (x'02', ?, ?)", (bytes(15) + b"\1", bytes([90]) * 768))
    assert not list(near_pairs(ledger))


def test_a_row_of_training_in_evaluation(ledger):
    ledger.add([row(0, content=b"a"), row(1, content=b"b"), row(2, "test", content=b"a", digest=b"\0", path="0.png")])
    assert found(ledger, "leak_row") == [(2, "is also a test row, rows.csv:4")]
    assert ledger.counts() == {"leak_row": 1}


def test_a_medium_of_training_in_evaluation(ledger):
    ledger.add([row(0, digest=b"a"), row(1), row(2, "validation", digest=b"a", path="0.png")])
    assert found(ledger, "leak_medium") == [(2, "its medium is also that of a validation row, rows.csv:4")]
    assert ledger.counts() == {"leak_medium": 1}


def test_a_picture_like_one_of_evaluation(ledger):
    ledger.add([row(0, "test", hashed=bytes(16)), row(1, hashed=bytes(15) + b"\1"), row(2, hashed=bytes(15) + b"\3")])
    assert found(ledger, "leak_near") == [
        (3, "at thumbnail size 99.2% similar to that of rows.csv:2"),
        (4, "at thumbnail size 98.4% similar to that of rows.csv:2"),
    ]
    assert ledger.counts() == {"leak_near": 2, "near": 1}


def test_the_same_row_twice_and_under_another_name(ledger):
    ledger.add([row(0, content=b"a", digest=b"a"), row(1, content=b"a", digest=b"a"), row(2, "test")])
    assert found(ledger, "identical") == [(3, "the same as rows.csv:2")]
    assert ledger.counts() == {"identical": 1, "duplicate": 1}


def test_the_same_question_with_two_answers(ledger):
    ledger.add([row(n, question=b"q", label=label) for n, label in enumerate(("cat", "cat", "dog"))])
    assert found(ledger, "contradiction") == [(4, "'dog' here, 'cat' for the same in rows.csv:2")]


def test_labels(ledger):
    labels = ["cat"] * 40 + ["dog"] * 30 + ["newt"] * 2
    ledger.add([row(n, label=label) for n, label in enumerate(labels)])
    ledger.add([row(100, "test", label="cat"), row(101, "test", label="yak")])
    ((number, text),) = found(ledger, "imbalance")
    assert number == 0 and "1 of 3 labels are rare among 72 training rows: 'newt' 2; most frequent: 'cat' 40" in text
    assert [finding.text for finding in ledger.findings("unknown_label")] == ["'yak' isn't a label of any training row"]


def test_labels_that_differ_in_their_spelling_only(ledger):
    labels = ["Ａ类", "A类", "a 类", "差评。", "差评", "C", "C++", "1", "-1"] * 6
    ledger.add([row(n, label=label) for n, label in enumerate(labels)])
    assert sorted(text for _, text in found(ledger, "spelling")) == [
        "'A类' 6, 'a 类' 6, 'Ａ类' 6 training rows: one label, in several spellings?",
        "'差评' 6, '差评。' 6 training rows: one label, in several spellings?",
    ]


def test_pictures_that_groups_of_a_ranking_share_are_no_leak(ledger):
    rows = row(0, digest=b"a"), row(1, "test", digest=b"a", path="0.png")
    ledger.add([replace(one, ranked=True) for one in rows])
    assert found(ledger, "leak_medium") == []
