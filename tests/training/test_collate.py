import torch

from finetune.training.collate import Collator

SAMPLES = [
    {"input_ids": [10, 11, 12], "labels": [10, -100, 12], "media_kinds": ["image"], "media_keys": ["a"]},
    {"input_ids": [20, 21], "labels": [-100, 21], "media_kinds": [], "media_keys": []},
    {
        "input_ids": [30, 31, 32, 33],
        "labels": [-100, 31, -100, 33],
        "media_kinds": ["image", "audio"],
        "media_keys": ["b", "c"],
    },
]
ROW = [{"samples": [2, 0, 1]}]


def name(kind: str, key: str) -> str:
    return f"{kind} {key}"


def test_packed_samples_stand_one_after_the_other_with_positions_of_their_own():
    batch = Collator(SAMPLES, name, field="features")(ROW)
    assert batch["input_ids"].tolist() == [[30, 31, 32, 33, 10, 11, 12, 20, 21]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1]]
    # A sample's first token isn't predicted from the sample before it, whatever its label.
    assert batch["labels"].tolist() == [[-100, 31, -100, 33, -100, -100, 12, -100, 21]]
    assert batch["features"] == {"image": ["image b", "image a"], "audio": ["audio c"]}
    assert "attention_mask" not in batch


def test_padded_samples_are_rows():
    batch = Collator(SAMPLES, name, field="media", packed=False, pad_token_id=9)(ROW)
    assert batch["input_ids"].tolist() == [[30, 31, 32, 33], [10, 11, 12, 9], [20, 21, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 31, -100, 33], [-100, -100, 12, -100], [-100, 21, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
    assert batch["media"] == {"image": ["image b", "image a"], "audio": ["audio c"]}


def test_label_rows_are_the_places_before_each_learnt_token():
    for packed in (True, False):
        batch = Collator(SAMPLES, name, field="features", packed=packed)(ROW)
        labels = batch["labels"]
        expected = [
            row * labels.shape[1] + place
            for row in range(labels.shape[0])
            for place in range(labels.shape[1] - 1)
            if labels[row, place + 1] != -100
        ]
        assert batch["label_rows"].tolist() == expected
        assert batch["shift_labels"].tolist() == [[31, 33, 12, 21]]


def test_several_rows_become_one():
    batch = Collator(SAMPLES, name, field="features")([{"samples": [0]}, {"samples": [1]}])
    assert torch.equal(
        batch["input_ids"], Collator(SAMPLES, name, field="features")([{"samples": [0, 1]}])["input_ids"]
    )
