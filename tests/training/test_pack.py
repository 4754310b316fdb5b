import random
import tracemalloc
from array import array
from collections import Counter
from types import SimpleNamespace

import pytest
from peak_bytes import peak_bytes

from finetune.common.errors import DataError
from finetune.training import stage_training
from finetune.training.pack import MOST_BRANCHES, Rows, Sharing, epoch_order, pack, plan_rows, units


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_cut_or_repeated_and_no_row_overflows(seed):
    generator = random.Random(seed)
    lengths = [generator.randint(1, 100) for _ in range(500)]
    order = generator.sample(range(500), 500)
    rows = pack(lengths, 128, order)
    assert sorted(sample for row in rows for sample in row) == list(range(500))
    assert max(sum(lengths[sample] for sample in row) for row in rows) <= 128
    assert all(rows)
    assert sum(lengths) / (128 * len(rows)) > 0.9  # of the tokens of all rows are used


def test_a_row_is_filled_to_its_last_token():
    assert pack([3, 5, 8], 8, [0, 1, 2]) == [[0, 1], [2]]


def test_the_order_stays_close_to_the_given_one():
    generator = random.Random(0)
    lengths = [generator.randint(20, 60) for _ in range(1000)]
    rows = pack(lengths, 100, range(1000))
    assert max(max(row) - min(row) for row in rows) < 100


def test_eight_rows_stay_open_and_the_fullest_is_closed_for_a_ninth():
    lengths = [9, *[6] * 8, 1]  # rows of ten: one token is free in the first, four in each other
    assert pack(lengths, 10, [*range(8), 9]) == [[0, 9], *([sample] for sample in range(1, 8))]
    assert pack(lengths, 10, range(10)) == [[0], [1, 9], *([sample] for sample in range(2, 9))]


def test_of_equally_full_rows_the_oldest_is_closed():
    assert pack([6] * 9 + [4], 10, [8, 7, 6, 5, 4, 3, 2, 1, 0, 9])[:2] == [[8], [7, 9]]


def test_a_sample_longer_than_a_row_is_an_error():
    assert pack([5, 16], 16, [0, 1]) == [[0], [1]]
    with pytest.raises(DataError, match=r"sample 1 has 17 tokens: more than tokens_per_batch \(16\)"):
        pack([5, 17], 16, [0, 1])


@pytest.mark.parametrize("weight", [1, 2, 3])
def test_a_whole_weight_is_the_times_a_sample_comes_in_every_epoch(weight):
    for epoch in range(3):
        assert Counter(epoch_order([weight] * 20, 0, epoch)) == Counter(dict.fromkeys(range(20), weight))


def test_a_broken_weight_holds_on_average():
    counts = Counter(sample for epoch in range(400) for sample in epoch_order([0.25, 1.0, 2.5], 0, epoch))
    assert counts[1] == 400
    # Four standard deviations of a binomial draw.
    assert abs(counts[0] - 100) < 4 * (400 * 0.25 * 0.75) ** 0.5
    assert abs(counts[2] - 1000) < 4 * (400 * 0.5 * 0.5) ** 0.5


def test_an_epoch_is_drawn_from_its_seed_and_number_alone():
    weights = [1.0, 0.5, 2.0] * 20
    assert epoch_order(weights, 7, 0) == epoch_order(weights, 7, 0)
    assert epoch_order(weights, 7, 0) != epoch_order(weights, 7, 1)
    assert epoch_order(weights, 7, 0) != epoch_order(weights, 8, 0)


def flat(rows):
    return [[sample for group in row for sample in group] for row in rows]


def test_a_plan_holds_every_epoch_whole():
    lengths, weights = [5, 9, 3, 7], [1.0, 2.0, 1.0, 1.0]
    rows = plan_rows(lengths, weights, capacity=12, epochs=3, seed=1)
    assert all(len(group) == 1 for row in rows for group in row)
    assert Counter(sample for row in flat(rows) for sample in row) == Counter({0: 3, 1: 6, 2: 3, 3: 3})
    assert rows == plan_rows(lengths, weights, capacity=12, epochs=3, seed=1)
    first = pack(lengths, 12, epoch_order(weights, 1, 0))
    assert flat(rows)[: len(first)] == first  # no row mixes epochs


def test_a_group_stays_in_one_row_where_it_fits():
    lengths = [4, 3, 5, 4, 6, 2, 3, 4]
    groups = [[0, 2], [1, 3, 5], [4], [6, 7]]
    rows = flat(plan_rows(lengths, [1.0] * 8, capacity=12, epochs=4, seed=3, groups=groups))
    assert Counter(sample for row in rows for sample in row) == Counter(dict.fromkeys(range(8), 4))
    assert all(sum(lengths[sample] for sample in row) <= 12 for row in rows)
    for group in groups:
        assert sum(set(group) <= set(row) for row in rows) == 4, group


def test_a_group_larger_than_a_row_is_dealt_into_several():
    lengths, group = [5] * 9, list(range(9))
    dealt = units([group], lengths, 20, seed=1)
    assert sorted(sample for unit in dealt for sample in unit) == group
    assert [len(unit) for unit in dealt] == [4, 4, 1]
    assert dealt == units([group], lengths, 20, seed=1) != units([group], lengths, 20, seed=2)
    with pytest.raises(DataError, match="more than tokens_per_batch"):
        plan_rows([50], [1.0], capacity=20, epochs=1, seed=0, groups=[[0]])


@pytest.mark.parametrize("seed", range(3))
def test_a_group_that_fills_a_row_keeps_its_order(seed):
    assert units([[2, 0, 1], [3]], [5, 5, 5, 1], 15, seed) == [[2, 0, 1], [3]]
    assert units([[3]], [5, 5, 5, 1], 15, seed) == [[3]]


def test_a_large_group_is_dealt_anew_in_every_epoch():
    def dealt(epochs, seed):
        return flat(plan_rows([5] * 9, [1.0] * 9, capacity=20, epochs=epochs, seed=seed, groups=[range(9)]))

    first, second = dealt(2, seed=1)[:3], dealt(2, seed=1)[3:]
    assert {frozenset(row) for row in first} != {frozenset(row) for row in second}
    assert {frozenset(row) for row in dealt(1, seed=2)} != {frozenset(row) for row in first}


@pytest.mark.parametrize("seed", range(3))
def test_samples_that_share_their_beginning_stand_together(seed):
    generator = random.Random(seed)
    group = [number // 5 for number in range(100)]  # twenty groups of five
    lengths = [generator.randint(45, 60) for _ in range(100)]
    rows = plan_rows(lengths, [1.0] * 100, capacity=105, epochs=2, seed=seed, sharing=Sharing(group, [40] * 100))
    assert Counter(sample for row in flat(rows) for sample in row) == Counter(dict.fromkeys(range(100), 2))
    assert all(len({group[sample] for sample in together}) == 1 for row in rows for together in row)
    tokens = [sum(40 + sum(lengths[sample] - 40 for sample in together) for together in row) for row in rows]
    assert max(tokens) <= 105
    # All five where a row has room for them behind their prefix, as many as it has room for otherwise.
    fitting = sum(40 + sum(length - 40 for length in lengths[i : i + 5]) <= 105 for i in range(0, 100, 5))
    assert 0 < fitting < 20 and sum(len(together) == 5 for row in rows for together in row) == 2 * fitting


def test_how_many_samples_stand_behind_a_prefix_is_bounded():
    sharing = Sharing([0] * 50, [10] * 50)
    rows = plan_rows([11] * 50, [1.0] * 50, capacity=1000, epochs=1, seed=0, sharing=sharing)
    assert [len(group) for row in rows for group in row] == [MOST_BRANCHES] * 3 + [2]


@pytest.mark.parametrize(
    ("lengths", "questions", "saved", "capacity"),
    [
        ((30, 60), 5, 20, 512),
        ((30, 60), 300, 20, 512),
        ((34, 38), 5, 22, 512),
        ((70, 76), 5, 55, 512),
        ((116, 125), 2, 105, 512),
        ((116, 125), 5, 105, 2048),
        ((600, 640), 5, 585, 4096),
        ((40, 40), 2, 30, 100),
        ((26, 26), 3, 20, 100),
        ((700, 700), 2, 600, 2048),
        ((340, 340), 2, 256, 1024),
        ((700, 700), 4, 600, 4096),
    ],
)
@pytest.mark.parametrize("media", [10, 60])
def test_an_epoch_has_as_many_steps_as_without_sharing(lengths, questions, saved, capacity, media):
    generator = random.Random(0)
    tokens = [generator.randint(*lengths) for _ in range(media * min(questions, 5))]
    sharing = Sharing([number // questions for number in range(len(tokens))], [saved] * len(tokens))
    apart, shared = (
        len(plan_rows(tokens, [1.0] * len(tokens), capacity=capacity, epochs=1, seed=0, sharing=one))
        for one in (None, sharing)
    )
    assert shared == apart


def test_rows_are_filled_alike_where_samples_share_their_beginning():
    """Questions about pictures, of which 1.3 fill a row if nothing is shared: one or two, not four in one row."""
    generator = random.Random(0)
    tokens = [generator.randint(70, 76) for _ in range(300)]
    sharing = Sharing([number // 5 for number in range(300)], [55] * 300)
    rows = plan_rows(tokens, [1.0] * 300, capacity=512, epochs=1, seed=0, sharing=sharing)
    assert {len(row) for row in rows} == {1, 2}


def test_rows_that_share_nothing_are_filled_first_fit():
    generator = random.Random(0)
    tokens = [generator.randint(5, 200) for _ in range(300)]
    for sharing in (None, Sharing.none(300)):
        rows = plan_rows(tokens, [1.0] * 300, capacity=512, epochs=1, seed=0, sharing=sharing)
        expected = pack(tokens, 512, epoch_order([1.0] * 300, 0, 0))
        assert [[sample for group in row for sample in group] for row in rows] == expected


def test_a_group_that_alone_would_fill_more_than_a_row_stays_together():
    """So that an epoch has fewer steps: here two fifths."""
    sharing = Sharing([number // 10 for number in range(600)], [105] * 600)
    rows = plan_rows([120] * 600, [1.0] * 600, capacity=512, epochs=1, seed=0, sharing=sharing)
    assert [len(group) for row in rows for group in row] == [10] * 60 and len(rows) == 60  # 4 in a row otherwise


def test_a_ranking_keeps_its_samples_in_a_row_and_shares_within_it():
    sharing = Sharing([0, 0, 2, 0, 2], [3, 3, 3, 3, 3])
    ranked = [[0, 2, 1, 4], [3]]
    rows = plan_rows([5] * 5, [1.0] * 5, capacity=20, epochs=1, seed=0, groups=ranked, sharing=sharing)
    assert sorted(sorted(row) for row in rows) in ([[[0, 1], [2, 4]], [[3]]], [[[0, 1], [2, 4], [3]]])


def test_pairs_about_one_medium_share_it():
    """Four pairs about each of five pictures: a pair is never parted, and a picture stands once in a row."""
    sharing = Sharing([number // 8 for number in range(40)], [30] * 40)
    pairs = [[2 * number, 2 * number + 1] for number in range(20)]
    rows = plan_rows([35] * 40, [1.0] * 40, capacity=300, epochs=1, seed=0, groups=pairs, sharing=sharing)
    together = [group for row in rows for group in row]
    assert sorted(map(len, together)) == [8] * 5
    assert all(group[place] + 1 == group[place + 1] for group in together for place in range(0, 8, 2))


def test_rows_in_arrays_are_those_that_were_added():
    added = [[[3, 1], [2]], [], [[70000]], [[0], [5, 4, 6]]]
    rows = Rows.of(added)
    assert [*rows] == added and len(rows) == 4
    assert rows[-1] == added[-1] and rows[1:3] == added[1:3]
    with pytest.raises(IndexError):
        rows[4]
    assert rows != Rows.of([*added[:3], [[0, 5], [4, 6]]])


def test_a_row_of_an_epoch_takes_a_few_bytes():
    samples = 2_000
    rows = plan_rows([100] * samples, [1.0] * samples, capacity=1000, epochs=2, seed=0)
    tracemalloc.start()
    copy = Rows.of(rows)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert copy == rows and size < 10 * 2 * samples


def test_a_plan_needs_few_bytes_for_each_sample():
    count = 10_000
    lengths, weights = array("q", [100]) * count, array("d", [1.0]) * count
    assert peak_bytes(lambda: plan_rows(lengths, weights, capacity=1000, epochs=1, seed=0)) < 180 * count


@pytest.mark.parametrize("processes, filler", [(1, 0), (2, 1), (5, 2)])
def test_the_last_rows_are_filled_up_for_all_processes(processes, filler, monkeypatch):
    monkeypatch.setattr(stage_training, "PartialState", lambda: SimpleNamespace(num_processes=processes))
    rows = [[[3, 1], [2]], [[0]], [[4]]]
    for given in (rows, Rows.of(rows)):
        dataset = stage_training.packed_rows(given)
        assert dataset["groups"][:] == [*rows, *rows[:filler]]
        assert dataset["filler"][:] == [False] * 3 + [True] * filler
