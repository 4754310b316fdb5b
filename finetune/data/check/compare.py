"""What is wrong with rows among others: repeated, leaking into evaluation, contradictory, or near-duplicates."""

import unicodedata
from collections.abc import Iterator
from itertools import groupby, islice
from typing import TYPE_CHECKING

from finetune.data.check.ledger import Finding, Ledger

if TYPE_CHECKING:
    import numpy as np

BANDS = 8  # of 16 bits: of two hashes that differ in fewer bits than there are bands, one band is equal
NEAR_BITS = 6  # of 128: pictures whose hashes differ in more are no near-duplicates
NEAR_LEVELS = 6.0  # of 255: nor are those whose 16 x 16 RGB thumbnails differ by more on average
BLOCK = 1024  # hashes compared at once with as many others
MAX_PAIRS = 20_000  # reported
RARE = 5  # rows: a label with fewer is rare, and so is one
UNEVEN = 20  # times rarer than the most frequent
MAX_LABELS = 200  # with more they are taken for free text

EVALUATED = "split in ('validation', 'test')"


def compare(ledger: Ledger) -> None:
    """Add the findings that come from comparing rows. To be called once, after all rows were added."""
    ledger.index()
    for findings in (
        _identical(ledger),
        _leaking_rows(ledger),
        _leaking_media(ledger),
        _contradictions(ledger),
        _duplicates(ledger),
        _near(ledger),
        _labels(ledger),
    ):
        while batch := list(islice(findings, 1000)):
            ledger.add_findings(batch)


def _identical(ledger: Ledger) -> Iterator[Finding]:
    query = """
        select r.id, r.source, r.number, f.source, f.number
        from (select content, split, min(id) as first from rows group by content, split having count(*) > 1) g
        join rows r on r.content = g.content and r.split = g.split and r.id != g.first
        join rows f on f.id = g.first order by r.id"""
    for row, source, number, *first in ledger.query(query):
        yield Finding("identical", f"the same as {ledger.where(*first)}", row, source, number)


def _leaking_rows(ledger: Ledger) -> Iterator[Finding]:
    query = f"""
        select t.id, t.source, t.number, e.split, e.source, e.number, min(e.id)
        from rows t join rows e on e.content = t.content and e.{EVALUATED}
        where t.split = 'train' group by t.id order by t.id"""
    for row, source, number, split, *other, _ in ledger.query(query):
        yield Finding("leak_row", f"is also a {split} row, {ledger.where(*other)}", row, source, number)


def _leaking_media(ledger: Ledger) -> Iterator[Finding]:
    query = f"""
        with evaluated as (
            select u.digest, min(r.id) as row from uses u join rows r on r.id = u.row where r.{EVALUATED}
            group by u.digest)
        select t.id, t.source, t.number, u.path, e.split, e.source, e.number, min(e.id)
        from evaluated v join uses u on u.digest = v.digest join rows t on t.id = u.row join rows e on e.id = v.row
        where t.split = 'train' and not t.ranked and t.id not in (select row from findings where code = 'leak_row')
        group by t.id order by t.id"""
    for row, source, number, path, split, *other, _ in ledger.query(query):
        text = f"its medium is also that of a {split} row, {ledger.where(*other)}"
        yield Finding("leak_medium", text, row, source, number, path)


def _contradictions(ledger: Ledger) -> Iterator[Finding]:
    query = """
        select r.id, r.source, r.number, r.answer, f.source, f.number, f.answer,
               (select path from uses where row = r.id limit 1)
        from (select question, min(id) as first from rows where answer != ''
              group by question having count(distinct answer) > 1) g
        join rows r on r.question = g.question join rows f on f.id = g.first
        where r.answer != f.answer order by r.id"""
    for row, source, number, answer, other_source, other_number, other_answer, path in ledger.query(query):
        text = f"{answer!r} here, {other_answer!r} for the same in {ledger.where(other_source, other_number)}"
        yield Finding("contradiction", text, row, source, number, path or "")


def _duplicates(ledger: Ledger) -> Iterator[Finding]:
    query = """
        select min(u.row), r.source, r.number, u.path, g.first
        from (select digest, min(path) as first from uses group by digest having count(distinct path) > 1) g
        join uses u on u.digest = g.digest and u.path != g.first left join rows r on r.id = u.row
        group by u.path order by u.path"""
    for row, source, number, path, first in ledger.query(query):
        yield Finding("duplicate", "the same bytes under another name", row, source or 0, number or 0, path, first)


def _near(ledger: Ledger) -> Iterator[Finding]:
    query = """
        select r.id, r.source, r.number, u.path, r.split from uses u join rows r on r.id = u.row where u.digest = ?
        order by r.split = ? desc, r.id limit 1"""
    splits = f"""
        select max(r.split = 'train' and not r.ranked), max(r.{EVALUATED}) from uses u join rows r on r.id = u.row
        where u.digest = ?"""
    count = 0
    for left, right, bits in near_pairs(ledger):
        (left_trained, left_held), (right_trained, right_held) = (next(ledger.query(splits, d)) for d in (left, right))
        leaks = (left_trained and right_held) or (right_trained and left_held)
        first, second = (left, right) if left_trained or not leaks else (right, left)
        usage = next(ledger.query(query, first, "train"), None)
        other = next(ledger.query(query, second, "test" if leaks else "train"), None)
        if usage is None or other is None:
            continue  # unusable rows have a finding already
        row, source, number, path, _ = usage
        _, other_source, other_number, other_path, _ = other
        text = f"at thumbnail size {1 - bits / 128:.1%} similar to that of {ledger.where(other_source, other_number)}"
        yield Finding("leak_near" if leaks else "near", text, row, source, number, path, other_path)
        count += 1
        if count == MAX_PAIRS:
            yield Finding("near", f"{MAX_PAIRS:,} pairs are near-duplicates; the search ended there")
            return


def near_pairs(ledger: Ledger) -> Iterator[tuple[bytes, bytes, int]]:
    """(digest, digest, differing bits) of near-duplicate pictures. Each pair comes once; among equal hashes
    each picture is paired with the first only.

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
            digests, hashes = zip(*((digest, picture_hash) for _, digest, picture_hash in group), strict=True)
            if len(digests) < 2:
                continue
            for i, j, bits in _alike(np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16), band):
                if _levels(ledger, digests[i], digests[j]) <= NEAR_LEVELS:
                    yield digests[i], digests[j], bits


def _alike(hashes: "np.ndarray", band: int) -> Iterator[tuple[int, int, int]]:
    """Pairs (i, j, differing bits) of the rows of (n, 16) uint8 hashes whose first equal band is `band`."""
    import numpy as np

    words, parts = hashes.view(np.uint64), hashes.view(np.uint16)
    for left in range(0, len(hashes), BLOCK):
        for right in range(left, len(hashes), BLOCK):
            differing = words[left : left + BLOCK, None] ^ words[None, right : right + BLOCK]
            bits = np.bitwise_count(differing).sum(-1)
            for i, j in np.argwhere(bits <= NEAR_BITS).tolist():
                one, other = left + i, right + j
                if one < other and int((parts[one] == parts[other]).argmax()) == band:
                    yield one, other, int(bits[i, j])


def _levels(ledger: Ledger, left: bytes, right: bytes) -> float:
    """Mean absolute difference of two thumbnails, in levels of 255."""
    import numpy as np

    one, other = (
        np.frombuffer(next(ledger.query("select thumbnail from media where digest = ?", digest))[0], np.uint8)
        for digest in (left, right)
    )
    return float(np.abs(one.astype(np.int16) - other).mean())


def _spoken(label: str) -> str:
    """A label without what isn't heard: width and case of letters, spaces, a mark at the end."""
    return "".join(unicodedata.normalize("NFKC", label).casefold().split()).rstrip(".。,;!")


def _labels(ledger: Ledger) -> Iterator[Finding]:
    counted = "select label, count(*) from labels where label_set = ? and split = 'train' group by label order by 2, 1"
    unknown = f"""
        select r.id, r.source, r.number, l.label from labels l join rows r on r.id = l.row
        where l.label_set = ? and l.{EVALUATED} and not exists
            (select 1 from labels t where t.label_set = l.label_set and t.split = 'train' and t.label = l.label)
        order by r.id"""
    first_source = (
        "select source from labels l join rows r on id = row where label_set = ? and r.split = 'train' limit 1"
    )
    ledger.base.execute("create index labels_label on labels (label_set, split, label)")
    for (label_set,) in list(ledger.query("select distinct label_set from labels order by label_set")):
        counts = list(ledger.query(counted, label_set))
        rows, most = sum(count for _, count in counts), max((count for _, count in counts), default=0)
        if not 2 <= len(counts) <= MAX_LABELS:
            continue
        rare = [(label, count) for label, count in counts if count < RARE or count * UNEVEN < most]
        (source,) = next(ledger.query(first_source, label_set))
        for _, spellings in groupby(sorted(counts, key=lambda pair: _spoken(pair[0])), lambda pair: _spoken(pair[0])):
            if len(shown := [f"{label!r} {count:,}" for label, count in spellings]) > 1:
                text = f"{', '.join(shown)} training rows: one label, in several spellings?"
                yield Finding("spelling", text, None, source)
        if rare:
            few = ", ".join(f"{label!r} {count}" for label, count in rare[:5]) + (" ..." if len(rare) > 5 else "")
            text = (
                f"{len(rare)} of {len(counts)} labels are rare among {rows:,} training rows: {few}; most frequent: "
                f"{counts[-1][0]!r} {most:,}"
            )
            yield Finding("imbalance", text, None, source)
        for row, source, number, label in ledger.query(unknown, label_set):
            yield Finding("unknown_label", f"{label!r} isn't a label of any training row", row, source, number)
