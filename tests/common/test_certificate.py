"""Certificates: read, checked against folders, and written as a table."""

import hashlib
import json

import pytest

from finetune.common.certificate import FORMAT, file_hash, file_hashes, markdown, read_certificate, table, verify
from finetune.common.errors import ArtifactError


@pytest.fixture
def merged(tmp_path):
    """A folder with a certificate in it."""
    for name, content in {"model.safetensors": b"weights", "config.json": b"{}", "sub/tokenizer.json": b"[]"}.items():
        path = tmp_path / "merged" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    measures = {"kl": 0.002, "agreement": 0.99, "largest_logit_difference": 0.3, "kl_from_base": 1.5}
    content = {
        "format": FORMAT,
        "merged_into": "the dequantized nf4 LLM",
        "why": "it is closer",
        "reference": "the adapter over the nf4 LLM",
        "rows": 64,
        "positions": 145,
        "primary": {"mood": "f1", "words": "exact_match"},
        "saved": measures,
        "candidates": {
            "the 16-bit LLM": {**measures, "kl": None, "not_scored": "no memory"},
            "the dequantized nf4 LLM": {**measures, "scores": {"mood": {"f1": 0.75, "accuracy": 0.8}}},
        },
        "trained": {"kl": 0.0, "agreement": 1.0, "scores": {"mood": {"f1": 0.7}}},
        "base": {"kl": 2.0, "kl_from_base": 0.0},
        "sha256": file_hashes(tmp_path / "merged"),
        "adapter_sha256": {"adapter_model.safetensors": "ab" * 32},
    }
    (tmp_path / "merged" / "certificate.json").write_text(json.dumps(content))
    return tmp_path / "merged"


def test_a_folder_that_is_as_it_was_is_verified(merged):
    certificate = read_certificate(merged)
    assert read_certificate(merged / "certificate.json") == certificate
    assert certificate["sha256"]["model.safetensors"] == hashlib.sha256(b"weights").hexdigest()
    assert set(certificate["sha256"]) == {"model.safetensors", "config.json", "sub/tokenizer.json"}
    (merged / "README.md").write_text("a card")
    (merged / ".cache").mkdir()
    (merged / ".cache" / "lock").write_text("")
    verify(certificate, merged)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "sub/tokenizer.json"])
def test_the_file_that_differs_is_named(merged, name):
    certificate = read_certificate(merged)
    (merged / name).write_bytes((merged / name).read_bytes() + b" ")
    with pytest.raises(ArtifactError, match=rf"{name}: sha256 {file_hash(merged / name)[:12]}.*other weights"):
        verify(certificate, merged)
    (merged / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name} is missing, but certified"):
        verify(certificate, merged)


def test_a_file_too_many_is_named(merged):
    (merged / "model-00002-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"model-00002-of-00002.safetensors isn't among the certified files"):
        verify(read_certificate(merged), merged)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda path: path.unlink(), "is missing: `finetune merge` writes it"),
        (lambda path: path.write_text('{"format": 1'), "is damaged"),
        (lambda path: path.write_text("[1]"), r"isn't a certificate of format 1 \(found: list\)"),
        (lambda path: path.write_text('{"sha256": {}}'), r"isn't a certificate of format 1 \(found: None\)"),
        (lambda path: path.write_text('{"format": 1, "sha256": {}}'), "has no sha256; merge again"),
    ],
)
def test_a_certificate_that_is_none_says_so(merged, change, told):
    change(merged / "certificate.json")
    with pytest.raises(ArtifactError, match=told):
        read_certificate(merged)


def test_the_adapter_s_folder_is_checked_likewise(merged, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"another")
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors: sha256"):
        verify(read_certificate(merged), adapter, key="adapter_sha256")


def test_the_table_has_a_row_a_model(merged):
    rows = table(read_certificate(merged))
    assert [row["candidate"] for row in rows] == [
        "the adapter over the nf4 LLM",
        "merged into the 16-bit LLM",
        "merged into the dequantized nf4 LLM",
        "the LLM without the adapter",
    ]
    assert [row["kept"] for row in rows] == [False, False, True, False]
    assert [row["kl"] for row in rows] == [0.0, None, 0.002, 2.0]
    assert rows[2]["scores"] == {"mood.f1": 0.75, "words.exact_match": None}


def test_the_table_is_written_for_a_card(merged):
    text = markdown(read_certificate(merged))
    lines = text.splitlines()
    assert lines[0].startswith("Merged into the dequantized nf4 LLM: it is closer. Compared with the adapter over")
    assert {line.count("|") for line in lines[2:]} == {7} and len(lines) == 8
    assert "mood.f1" in lines[2] and "words" not in text
    assert "| merged into the dequantized nf4 LLM (kept) | 0.002 | 99.0% | 0.3 | 1.5 | 0.750 |" in lines
