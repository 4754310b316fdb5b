import pytest
import tiny_formats
from tiny_formats import put

from finetune.common.errors import DataError
from finetune.data.formats import transcripts


def read(path, **options):
    return list(transcripts.rows(path, transcripts.Options(**options)))


def test_common_voice(tmp_path):
    path = tiny_formats.common_voice(tmp_path)
    own = {"client_id": "ann", "path": "1.wav", "sentence": '"Well, he said.', "age": "twenties"}
    row = own | {"audio": "clips/1.wav", "text": '"Well, he said.', "speaker": "ann"}
    assert read(path) == [(2, row)]
    put(path / "train.tsv", "path\tsentence\n2.wav\t你好\n")
    assert read(path, file="train.tsv")[0][1]["text"] == "你好"
    put(path / "bad.tsv", "path\ttext\n")
    with pytest.raises(DataError, match=r"bad.tsv:1: no column 'sentence'"):
        read(path, file="bad.tsv")
    put(path / "bad.tsv", "path\tsentence\n1.wav\ta\tb\n")
    with pytest.raises(DataError, match=r"bad.tsv:2: fields"):
        read(path, file="bad.tsv")
    with pytest.raises(DataError, match=r"no file 'dev.tsv'"):
        read(path, file="dev.tsv")


def test_ljspeech(tmp_path):
    path = tiny_formats.ljspeech(tmp_path)
    row = {"audio": "wavs/LJ001.wav", "text": '"Dr. No, 3', "id": "LJ001", "normalized": "Doctor No, three"}
    assert read(path) == [(1, row)]
    put(path / "metadata.csv", "a.flac|x\n\nb|y|z|w\n")
    with pytest.raises(DataError, match=r"metadata.csv:3: 4 fields"):
        read(path)
    put(path / "metadata.csv", "a.flac|x\n")
    assert read(path)[0][1]["audio"] == "wavs/a.flac"
    put(path / "metadata.csv", "a|红\n".encode("gb18030"))
    with pytest.raises(DataError, match="not UTF-8"):
        read(path)


def test_kaldi(tmp_path):
    path = tiny_formats.kaldi(tmp_path)
    assert read(path) == [(1, {"audio": "a.wav", "id": "u1", "text": "你好 world", "speaker": "ann"})]
    put(path / "wav.scp", "u1 a.wav\nu2 b.wav\n")
    assert "text" not in read(path)[1][1]
    put(path / "text", "u1 a\nu3 b\n")
    with pytest.raises(DataError, match=r"1 utterances aren't in wav.scp, the first: 'u3'"):
        read(path)
    put(path / "text", "u1 a\nu1 b\n")
    with pytest.raises(DataError, match=r"text:2: 'u1' is written twice"):
        read(path)


@pytest.mark.parametrize(
    ("place", "message"),
    [("touch hacked |", "commands aren't run"), ("foo.ark:123", "a place in an archive")],
)
def test_no_command_is_run_for_a_recording(place, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tiny_formats.kaldi(tmp_path)
    put(path / "wav.scp", f"u1 {place}\n")
    with pytest.raises(DataError, match=f"wav.scp:1: {message}"):
        read(path)
    assert not (tmp_path / "hacked").exists()
    put(path / "segments", "")
    with pytest.raises(DataError, match="'segments' isn't supported"):
        read(path)


def test_a_folder_without_transcripts_is_told_what_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"none of validated.tsv with clips/"):
        read(tmp_path)


def test_recordings_beside_texts_of_their_names(tmp_path):
    for name, text in {"b": "two\nlines", "a": "\ufeff你好"}.items():
        put(tmp_path / f"{name}.txt", text)
        put(tmp_path / f"{name}.WAV", tiny_formats.sound())
    put(tmp_path / "c.mp3", b"x")
    assert transcripts.detects(tmp_path)
    assert [(n, row["audio"], row["text"]) for n, row in read(tmp_path)] == [
        (1, "a.WAV", "你好"),
        (2, "b.WAV", "two lines"),
        (3, "c.mp3", ""),
    ]
    put(tmp_path / "c.txt", "naïve".encode("cp1252"))
    with pytest.raises(DataError, match=r"c.txt: not UTF-8 \(byte 2\)"):
        read(tmp_path)
    put(tmp_path / "rows.csv", "audio,text\n")
    assert not transcripts.detects(tmp_path)
