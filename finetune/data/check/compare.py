"""What is wrong with rows beside other rows: there twice, in training and evaluation, with another label, or alike."""

from collections.abc import Callable, Iterator
from itertools import groupby, islice
from typing import Any

from finetune.data.check.ledger import Finding, Ledger

BANDS = 8  # of 16 bits: of two hashes that differ in fewer bits than there are bands, one band is equal
NEAR_BITS = 6  # of 128: pictures whose hashes differ in more aren't alike
NEAR_LEVELS = 6.0  # of 255: nor are those that differ by more, on average over 16 x 16 RGB
AT_ONCE = 1024  # hashes compared at once with as many others
MOST_PAIRS = 20_000  # told
RARE = 5  # rows: a label with fewer is rare
UNEVEN = 20  # times: or one so much rarer than the most frequent
MOST_LABELS = 200  # with more they aren't labels

EVALUATED = "split in ('validation', 'test')"
Where = Callable[[int, int], str]  # source and line -> "rows.csv:12"


def compare(ledger: Ledger, where: Where) -> None:
    """Add to the ledger what its rows are beside each other. To be called once, with all rows in it."""
    ledger.index()
    for findings in (
        _identical(ledger, where),
        _leaking_rows(ledger, where),
        _leaking_media(ledger, where),
        _contradictions(ledger, where),
        _duplicates(ledger, where),
        _near(ledger, where),
        _labels(ledger),
    ):
        for some in iter(lambda found=findings: list(islice(found, 1000)), []):  # type: ignore[misc]
            ledger.find(some)


def _identical(ledger: Ledger, where: Where) -> Iterator[Finding]:
    query = """
        select r.id, r.source, r.number, f.source, f.number
        from (select content, split, min(id) as first from rows group by content, split having count(*) > 1) g
        join rows r on r.content = g.content and r.split = g.split and r.id != g.first
        join rows f on f.id = g.first order by r.id"""
    for row, source, number, *first in ledger.all(query):
        yield Finding("identical", f"the same as {where(*first)}", row, source, number)


def _leaking_rows(ledger: Ledger, where: Where) -> Iterator[Finding]:
    query = f"""
        select t.id, t.source, t.number, e.split, e.source, e.number, min(e.id)
        from rows t join rows e on e.content = t.content and e.{EVALUATED}
        where t.split = 'train' group by t.id order by t.id"""
    for row, source, number, split, *other, _ in ledger.all(query):
        yield Finding("leak_row", f"is also a {split} row, {where(*other)}", row, source, number)


def _leaking_media(ledger: Ledger, where: Where) -> Iterator[Finding]:
    query = f"""
        with seen as (
            select u.digest, min(r.id) as row from uses u join rows r on r.id = u.row where r.{EVALUATED}
            group by u.digest)
        select t.id, t.source, t.number, u.path, e.split, e.source, e.number, min(e.id)
        from seen join uses u on u.digest = seen.digest join rows t on t.id = u.row join rows e on e.id = seen.row
        where t.split = 'train' and t.id not in (select row from findings where code = 'leak_row')
        group by t.id order by t.id"""
    for row, source, number, path, split, *other, _ in ledger.all(query):
        text = f"its medium is also that of a {split} row, {where(*other)}"
        yield Finding("leak_medium", text, row, source, number, path)


def _contradictions(ledger: Ledger, where: Where) -> Iterator[Finding]:
    query = """
        select r.id, r.source, r.number, r.answer, f.source, f.number, f.answer,
               (select path from uses where row = r.id limit 1)
        from (select question, min(id) as first from rows where answer != ''
              group by question having count(distinct answer) > 1) g
        join rows r on r.question = g.question join rows f on f.id = g.first
        where r.answer != f.answer order by r.id"""
    for row, source, number, answer, other_source, other_number, other, path in ledger.all(query):
        text = f"{answer!r} here, {other!r} for the same in {where(other_source, other_number)}"
        yield Finding("contradiction", text, row, source, number, path or "")


def _duplicates(ledger: Ledger, where: Where) -> Iterator[Finding]:
    query = """
        select min(u.row), r.source, r.number, u.path, g.first
        from (select digest, min(path) as first from uses group by digest having count(distinct path) > 1) g
        join uses u on u.digest = g.digest and u.path != g.first left join rows r on r.id = u.row
        group by u.path order by u.path"""
    for row, source, number, path, first in ledger.all(query):
        yield Finding("duplicate", "the same bytes under another name", row, source or 0, number or 0, path, first)


def _near(ledger: Ledger, where: Where) -> Iterator[Finding]:
    query = """
        select r.id, r.source, r.number, u.path, r.split from uses u join rows r on r.id = u.row where u.digest = ?
        order by r.split = ? desc, r.id limit 1"""
    splits = f"""
        select max(r.split = 'train'), max(r.{EVALUATED}) from uses u join rows r on r.id = u.row where u.digest = ?"""
    told = 0
    for left, right, bits in near_pairs(ledger):
        (left_trained, left_held), (right_trained, right_held) = (next(ledger.all(splits, d)) for d in (left, right))
        leaks = (left_trained and right_held) or (right_trained and left_held)
        first, second = (left, right) if left_trained or not leaks else (right, left)
        here = next(ledger.all(query, first, "train"), None)
        there = next(ledger.all(query, second, "test" if leaks else "train"), None)
        if here is None or there is None:
            continue  # rows that can't be used have been told already
        text = f"{1 - bits / 128:.1%} alike with that of {where(there[1], there[2])}"
        yield Finding("leak_near" if leaks else "near", text, here[0], here[1], here[2], here[3], there[3])
        told += 1
        if told == MOST_PAIRS:
            yield Finding("near", f"{MOST_PAIRS:,} pairs are alike; further ones weren't looked for")
            return


def near_pairs(ledger: Ledger) -> Iterator[tuple[bytes, bytes, int]]:
    """(digest, digest, bits that differ) of pictures that are alike: each pair once, and of pictures whose hashes are
    equal each with the first alone.

    Hashes that differ in at most NEAR_BITS < BANDS bits are equal in one of BANDS bands: only those are compared.
    """
    import numpy as np

    base = ledger.base
    base.executescript(
        """create temp table hashes as select hash, min(digest) as digest from media where hash != x'' group by hash;
           create index temp.hashes_hash on hashes (hash);
           create temp table bands (band integer, part blob, digest blob, hash blob);"""
    )
    equal = "select h.digest, m.digest from media m join hashes h on h.hash = m.hash where m.digest != h.digest"
    for left, right in base.execute(equal + " order by m.digest"):
        if _levels(ledger, left, right) <= NEAR_LEVELS:
            yield left, right, 0
    for band in range(BANDS):
        base.execute("insert into bands select ?, substr(hash, ?, 2), digest, hash from hashes", (band, 2 * band + 1))
    base.execute("create index temp.bands_part on bands (band, part, digest)")
    for band in range(BANDS):
        rows = base.execute("select part, digest, hash from bands where band = ? order by part, digest", (band,))
        for _, group in groupby(rows, key=lambda row: row[0]):
            digests, hashes = zip(*((digest, seen) for _, digest, seen in group), strict=True)
            if len(digests) < 2:
                continue
            for i, j, bits in _alike(np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16), band):
                if _levels(ledger, digests[i], digests[j]) <= NEAR_LEVELS:
                    yield digests[i], digests[j], bits


def _alike(hashes: Any, band: int) -> Iterator[tuple[int, int, int]]:
    """Pairs (i, j, bits) of rows of (n, 16) bytes whose first equal band is `band`."""
    import numpy as np

    words, parts = hashes.view(np.uint64), hashes.view(np.uint16)
    for left in range(0, len(hashes), AT_ONCE):
        for right in range(left, len(hashes), AT_ONCE):
            differing = words[left : left + AT_ONCE, None] ^ words[None, right : right + AT_ONCE]
            bits = np.bitwise_count(differing).sum(-1)
            for i, j in np.argwhere(bits <= NEAR_BITS).tolist():
                one, other = left + i, right + j
                if one < other and int((parts[one] == parts[other]).argmax()) == band:
                    yield one, other, int(bits[i, j])


def _levels(ledger: Ledger, left: bytes, right: bytes) -> float:
    """How far two pictures are apart, in levels of 255 on average over their thumbnails."""
    import numpy as np

    one, other = (
        np.frombuffer(next(ledger.all("select thumbnail from media where digest = ?", digest))[0], np.uint8)
        for digest in (left, right)
    )
    return float(np.abs(one.astype(np.int16) - other).mean())


def _labels(ledger: Ledger) -> Iterator[Finding]:
    counted = "select label, count(*) from labels where asked = ? and split = 'train' group by label order by 2, 1"
    unknown = f"""
        select r.id, r.source, r.number, l.label from labels l join rows r on r.id = l.row
        where l.asked = ? and l.{EVALUATED} and not exists
            (select 1 from labels t where t.asked = l.asked and t.split = 'train' and t.label = l.label)
        order by r.id"""
    shown = "select source from labels l join rows r on id = row where asked = ? and r.split = 'train' limit 1"
    ledger.base.execute("create index labels_label on labels (asked, split, label)")
    for (asked,) in list(ledger.all("select distinct asked from labels order by asked")):
        counts = list(ledger.all(counted, asked))
        rows, most = sum(count for _, count in counts), max((count for _, count in counts), default=0)
        if not 2 <= len(counts) <= MOST_LABELS:
            continue
        rare = [(label, count) for label, count in counts if count < RARE or count * UNEVEN < most]
        if rare:
            listed = ", ".join(f"{label!r} {count}" for label, count in rare[:5]) + (" ..." if len(rare) > 5 else "")
            text = (
                f"{len(rare)} of {len(counts)} labels are rare among {rows:,} training rows: {listed}; most frequent: "
                f"{counts[-1][0]!r} {most:,}"
            )
            (source,) = next(ledger.all(shown, asked))
            yield Finding("imbalance", text, None, source)
        for row, source, number, label in ledger.all(unknown, asked):
            yield Finding("unknown_label", f"{label!r} isn't a label of any training row", row, source, number)
