"""Which media are decoded and encoded, how many at once, and when the cache is read instead. The encoder counts."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from PIL import Image

from finetune.common.errors import DataError, MediaError, OutOfMemory
from finetune.data.media import decode
from finetune.data.sample import Layout, Medium, Prepared
from finetune.model import features as module
from finetune.model.features import Features, decode_for, encode_one, features_key, read_medium
from finetune.recipe.schema import Limits


@dataclass
class Counting:
    """Features of a picture: its width, as often as the picture is high; its layout: as many rows."""

    fingerprint: str = "counting"
    layout: Layout | None = None
    known: Layout | None = None
    most: int = 100  # memory for so many at once
    sampling: dict[str, float] = field(default_factory=dict)
    prepared: list[tuple[int, int]] = field(default_factory=list)  # widths and heights
    batches: list[int] = field(default_factory=list)
    asked: list[tuple[Medium, Limits]] = field(default_factory=list)  # for layouts

    def prepare(self, decoded: Image.Image) -> Prepared:
        self.prepared.append(decoded.size)
        return Prepared(torch.full((decoded.height,), float(decoded.width)), Layout(decoded.height))

    def encode(self, batch: torch.Tensor) -> torch.Tensor:
        if len(batch) > self.most:
            raise MemoryError
        self.batches.append(len(batch))
        assert not torch.is_grad_enabled()
        return batch[:, None, :, None]

    def layout_at(self, medium: Medium, limits: Limits) -> Layout | None:
        self.asked.append((medium, limits))
        return self.known


@pytest.fixture
def media(tmp_path) -> list[Medium]:
    sizes = [(3, 2), (4, 2), (5, 2), (6, 7), (8, 7)]
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    return [Medium("image", tmp_path / f"{number}.png", where=f"rows.csv:{number}") for number in range(len(sizes))]


def filled(encoder: Counting, folder: Path, media: list[Medium], **options: int) -> Features:
    features = Features({"image": encoder}, folder / "cache")
    features.fill(media, lambda: None, **options)
    return features


def test_features_that_are_kept_are_read_and_others_computed(media, tmp_path):
    encoder = Counting()
    features = filled(encoder, tmp_path, media[:2])
    assert encoder.prepared == [(3, 2), (4, 2)]
    assert features.features(media[1]).tolist() == [[[4.0], [4.0]]] and len(encoder.prepared) == 2
    assert features.layout(media[1]) == Layout(2) and len(encoder.prepared) == 2 and not encoder.asked
    assert features.features(media[2]).tolist() == [[[5.0], [5.0]]] and encoder.prepared[2:] == [(5, 2)]
    assert features.layout(media[2]) == Layout(2) and encoder.prepared[3:] == [(5, 2)]


def test_another_process_s_features_are_seen_after_a_refresh(media, tmp_path):
    features = Features({"image": Counting()}, tmp_path / "cache")
    filled(Counting(), tmp_path, media[:1])
    assert not features.known("image", media[0].key)
    features.refresh()
    assert features.known("image", media[0].key) and not features.known("image", media[1].key)
    assert features.known("audio", media[1].key)  # nothing is kept of that kind
    assert features.missing(media[:2]) == {"image": [media[1]]}


def test_without_a_cache_nothing_is_missing_or_kept(media):
    encoder = Counting()
    features = Features({"image": encoder}, None)
    assert features.stores == {} and features.missing(media) == {} and features.known("image", media[0].key)
    for count in (1, 2):
        assert features.features(media[0]).tolist() == [[[3.0], [3.0]]] and len(encoder.prepared) == count


def test_a_layout_is_read_from_the_cheapest_place(media, tmp_path):
    always, known = Layout(9), Layout(8)
    encoder, limits = Counting(layout=always, known=known), Limits(max_bytes=10**6)
    features = Features({"image": encoder}, None, limits)
    assert features.layout(media[3]) == always and not encoder.asked
    encoder.layout = None
    for _ in range(2):  # the header is read once
        assert features.layout(media[3]) == known and encoder.asked == [(media[3], limits)] and not encoder.prepared
    encoder.known = None
    for _ in range(2):  # and decoded once
        assert features.layout(media[4]) == Layout(7) and encoder.prepared == [(8, 7)]
    copy = Medium("image", tmp_path / "copy.png")
    copy.path.write_bytes(media[4].path.read_bytes())
    assert features.layout(copy) == Layout(7) and len(encoder.prepared) == 1  # by content, not by name


@pytest.mark.parametrize("batch, batches", [(1, [1] * 5), (2, [2, 1, 1, 1]), (3, [3, 2]), (100, [3, 2])])
def test_media_of_the_same_shape_are_encoded_together(batch, batches, media, tmp_path):
    """The sizes are 2, 2, 2, 7, 7 rows; batches are cut first, then by shape."""
    encoder, done = Counting(), []
    features = Features({"image": encoder}, tmp_path / "cache")
    features.fill(media, lambda: done.append(1), batch=batch)
    assert encoder.batches == batches and len(done) == len(media)
    for medium, (width, height) in zip(media, encoder.prepared, strict=True):
        assert torch.equal(features.features(medium), torch.full((1, height, 1), float(width)))


def test_one_at_a_time_is_the_default(media, tmp_path):
    encoder = Counting()
    filled(encoder, tmp_path, media[:3])
    assert encoder.batches == [1, 1, 1]
    prepared = [encoder.prepare(decode("image", medium.path)) for medium in media[:2]]
    Features({"image": encoder}, None).compute("image", prepared)
    assert encoder.batches[3:] == [1, 1]


def test_batches_are_halved_where_memory_runs_out(media, capsys):
    encoder = Counting(most=2)
    features = Features({"image": encoder}, None)
    prepared = [encoder.prepare(decode("image", medium.path)) for medium in media[:3]]
    assert [rows.shape for rows in features.compute("image", prepared, batch=3)] == [(1, 2, 1)] * 3
    assert encoder.batches == [1, 1, 1]
    assert (
        "out of memory encoding image: 1 at once from here on, not 3. For the next run write train.encode_batch: 1"
        in (capsys.readouterr().err.replace("\n", " "))
    )
    encoder.most = 0
    with pytest.raises(OutOfMemory) as error:
        features.compute("image", prepared[:1])
    assert str(error.value) == (
        "out of memory encoding image, for one alone. To need less, smaller media (media.*), train.encode_batch: 1, "
        "fewer tiles or frames, a smaller encoder; `finetune plan RECIPE` says what each takes"
    )


def test_seconds_add_up(media, monkeypatch):
    clock = iter([1.0, 3.0, 10.0, 15.0, 20.0, 21.0, 30.0, 37.0])
    monkeypatch.setattr(module, "perf_counter", lambda: next(clock))
    features = Features({"image": Counting()}, None)
    assert features.seconds == {"decode": 0.0, "encode": 0.0}
    features.features(media[0])
    assert features.seconds == {"decode": 2.0, "encode": 5.0}
    features.features(media[1])
    assert features.seconds == {"decode": 3.0, "encode": 12.0}


@pytest.mark.parametrize("bad", [[0], [4], [1, 2], [0, 1, 2, 3, 4]])
def test_bad_media_are_all_named_and_the_good_ones_kept(bad, media, tmp_path):
    for number in bad:
        media[number].path.write_bytes(b"no picture")
    encoder, done = Counting(), []
    features = Features({"image": encoder}, tmp_path / "cache")
    with pytest.raises(DataError) as error:
        features.fill(media, lambda: done.append(1), batch=2)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{len(bad)} of 5 media can't be used:"
    assert [line.split(": ")[0].strip() for line in lines[1:]] == [f"rows.csv:{number}" for number in bad]
    good = [number for number in range(5) if number not in bad]
    assert len(done) == len(good) == len(encoder.prepared)
    assert [number for number in range(5) if features.known("image", media[number].key)] == good


def test_only_damaged_files_of_the_media_at_hand_are_removed(media, tmp_path):
    features = filled(Counting(), tmp_path, media[:1])
    features.fill(media[1:2], lambda: None)
    files = sorted(features.stores["image"].folder.iterdir())
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = Features({"image": Counting()}, tmp_path / "cache")
    again.check([("audio", media[0].key), ("image", media[1].key), ("image", media[4].key)])
    assert again.known("image", media[0].key) and not again.known("image", media[1].key)
    assert len(list(again.stores["image"].folder.iterdir())) == 1


def test_missing_media_are_named_once_for_each_content_and_kind(media, tmp_path):
    copy = Medium("image", tmp_path / "copy.png")
    copy.path.write_bytes(media[0].path.read_bytes())
    frames = Medium("video", media[0].path)
    features = Features({"image": Counting(), "video": Counting("clips")}, tmp_path / "cache")
    assert features.missing([media[1], media[0], copy, media[1], frames]) == {"image": media[1::-1], "video": [frames]}
    assert features.stores["image"].folder != features.stores["video"].folder
    assert set(Features({"image": Counting()}, tmp_path / "cache").missing([frames, media[0]])) == {"image"}


def test_a_medium_is_decoded_as_its_encoder_samples_it_within_limits(media, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "decode", lambda kind, source, **options: calls.append((kind, source, options)))
    encoder, limits = Counting(sampling={"count": 4}), Limits(max_bytes=10)
    decode_for(encoder, "video", b"clip", limits)
    decode_for(encoder, "video", b"clip", limits, "a row")
    options = {"limits": limits, "count": 4}
    assert calls == [("video", b"clip", options | {"where": ""}), ("video", b"clip", options | {"where": "a row"})]


def test_a_medium_that_a_program_holds_is_read_in_place_of_a_file(media):
    encoder, absent = Counting(), Path("the first picture")
    for content in (media[3].path.read_bytes(), Image.new("RGB", (6, 7))):
        read = read_medium(encoder, Medium("image", absent, content=content), Limits())
        assert read.values.tolist() == [6.0] * 7
    with pytest.raises(MediaError, match=r"the first picture: .*`media\.max_pixels`"):
        read_medium(encoder, Medium("image", absent, content=media[3].path.read_bytes()), Limits(max_pixels=41))
    assert encode_one(encoder, read).tolist() == [[[6.0]] * 7] and encoder.batches == [1]


def test_a_key_stands_for_all_that_features_depend_on(monkeypatch):
    monkeypatch.setattr(module, "decoding", lambda kind: f"decoded as {kind}")
    small, smaller = Limits(shrink_to_pixels=2048), Limits(shrink_to_pixels=1024)
    encoder, other = Counting(), Counting("other")
    asked = [("image", encoder), ("video", encoder), ("image", other)]
    keys = {features_key(*one, limits) for one in asked for limits in (Limits(), small, smaller)}
    assert len(keys) == 9 and all(len(key) == 64 for key in keys)
    assert len({features_key("audio", encoder, limits) for limits in (Limits(), small, smaller)}) == 1
    assert features_key("image", encoder, Limits(max_bytes=5)) == features_key("image", encoder, Limits())
    # Caches that exist have these names.
    assert features_key("image", encoder, small) == hashlib.sha256(b"counting decoded as image 2048 pixels").hexdigest()
    assert features_key("audio", encoder, small) == hashlib.sha256(b"counting decoded as audio").hexdigest()
