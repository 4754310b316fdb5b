import torch
from packed import collator_of, tokenized_sample

from finetune.model.row_layout import RowKind
from finetune.training.samples import TokenizedSamples

SAMPLES = [
    tokenized_sample([10, 11, 12], [10, -100, 12], "image a"),
    tokenized_sample([20, 21], [-100, 21]),
    tokenized_sample([30, 31, 32, 33], [-100, 31, -100, 33], "image b", "audio c"),
]
ROW = [{"groups": [[2], [0], [1]], "filler": False}]


def name(medium) -> str:
    return f"{medium.kind} {medium.key}"


def test_packed_samples_stand_one_after_the_other_with_positions_of_their_own():
    batch = collator_of(SAMPLES, read=name)(ROW)
    assert batch["input_ids"].tolist() == [[30, 31, 32, 33, 10, 11, 12, 20, 21]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1]]
    # A sample's first token isn't predicted from the sample before it, whatever its label.
    assert batch["labels"].tolist() == [[-100, 31, -100, 33, -100, -100, 12, -100, 21]]
    assert batch["features"] == {"image": ["image b", "image a"], "audio": ["audio c"]}
    assert "attention_mask" not in batch


def test_padded_samples_are_rows():
    batch = collator_of(SAMPLES, read=name, field="media", kind=RowKind.PADDED, pad_token_id=9)(ROW)
    assert batch["input_ids"].tolist() == [[30, 31, 32, 33], [10, 11, 12, 9], [20, 21, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 31, -100, 33], [-100, -100, 12, -100], [-100, 21, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
    assert batch["media"] == {"image": ["image b", "image a"], "audio": ["audio c"]}


def test_label_rows_are_the_places_before_each_learned_token():
    for kind in (RowKind.PACKED, RowKind.PADDED):
        batch = collator_of(SAMPLES, read=name, kind=kind)(ROW)
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
    collator = collator_of(SAMPLES, read=name)
    several = collator([{"groups": [[0]], "filler": False}, {"groups": [[1]], "filler": False}])
    assert torch.equal(several["input_ids"], collator([{"groups": [[0], [1]], "filler": False}])["input_ids"])


def test_learned_tokens_are_counted_for_all_samples_at_once():
    samples = TokenizedSamples.of(SAMPLES).select([2, 0, 1])
    assert [*samples.learned] == [SAMPLES[number].learned for number in (2, 0, 1)]
    assert [*samples.learned] == [sum(label != -100 for label in SAMPLES[number].labels[1:]) for number in (2, 0, 1)]
