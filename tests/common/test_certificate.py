"""Certificates: read, checked against folders, and written as a table."""

import hashlib
import json
import math

import pytest
from certificate_files import certificate_content

from finetune.common.certificate import (
    Certificate,
    comparison,
    file_hashes,
    read_certificate,
    verify,
    verify_if_certified,
)
from finetune.common.errors import ArtifactError
from finetune.common.run_folder import file_hash


@pytest.fixture
def merged(tmp_path):
    """A folder with a certificate in it."""
    for name, content in {"model.safetensors": b"weights", "config.json": b"{}", "sub/tokenizer.json": b"[]"}.items():
        path = tmp_path / "merged" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    content = certificate_content(sha256=file_hashes(tmp_path / "merged"))
    (tmp_path / "merged" / "certificate.json").write_text(json.dumps(content))
    return tmp_path / "merged"


def test_it_is_written_with_the_keys_and_values_it_was_read_with(merged, tmp_path):
    before = json.loads((merged / "certificate.json").read_text())
    read_certificate(merged).write(tmp_path / "copy.json")
    assert json.loads((tmp_path / "copy.json").read_text()) == before
    assert read_certificate(tmp_path / "copy.json") == read_certificate(merged)


def test_a_distance_that_json_cannot_hold_is_null_and_infinite(merged, tmp_path):
    certificate = read_certificate(merged)
    assert certificate.candidates["the 16-bit LLM"].kl == math.inf
    certificate.write(tmp_path / "copy.json")
    assert json.loads((tmp_path / "copy.json").read_text())["candidates"]["the 16-bit LLM"]["kl"] is None


def test_every_key_is_documented():
    for section in ("Certificate", "Measures", "Bounds", "Dtypes", "LanguageModelFiles"):
        schema = Certificate.model_json_schema()
        for name, field in (schema if section == "Certificate" else schema["$defs"][section])["properties"].items():
            reference = field.get("$ref", "").rpartition("/")[2]
            assert field.get("description") or schema["$defs"][reference].get("description"), (section, name)


def test_a_folder_that_is_as_it_was_is_verified(merged):
    certificate = read_certificate(merged)
    assert read_certificate(merged / "certificate.json") == certificate
    assert certificate.sha256["model.safetensors"] == hashlib.sha256(b"weights").hexdigest()
    assert set(certificate.sha256) == {"model.safetensors", "config.json", "sub/tokenizer.json"}
    (merged / "README.md").write_text("a card")
    (merged / ".cache").mkdir()
    (merged / ".cache" / "lock").write_text("")
    verify(certificate, merged)
    verify_if_certified(merged)
    verify_if_certified(merged / "sub")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "sub/tokenizer.json"])
def test_the_file_that_differs_is_named(merged, name):
    certificate = read_certificate(merged)
    (merged / name).write_bytes((merged / name).read_bytes() + b" ")
    with pytest.raises(ArtifactError, match=rf"{name}: sha256 {file_hash(merged / name)[:12]}.*other weights"):
        verify_if_certified(merged)
    (merged / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name} is missing, but certified"):
        verify(certificate, merged)


def test_a_file_too_many_is_named(merged):
    (merged / "model-00002-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"model-00002-of-00002.safetensors isn't among the certified files"):
        verify(read_certificate(merged), merged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "is missing: `finetune merge` writes it"),
        (lambda path: path.write_text('{"format": 1'), "is damaged"),
        (lambda path: path.write_text("[1]"), "is damaged: list in place of an object"),
        (lambda path: path.write_text('{"sha256": {}}'), r"isn't a certificate of format 1 \(got: None\)"),
        (
            lambda path: path.write_text('{"format": 1, "sha256": {}}'),
            "is damaged: merged_into: Field required; merge again",
        ),
    ],
)
def test_a_certificate_that_is_none_says_so(merged, change, message):
    change(merged / "certificate.json")
    with pytest.raises(ArtifactError, match=message):
        read_certificate(merged)


def test_the_adapter_s_folder_is_checked_likewise(merged, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"another")
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors: sha256"):
        verify(read_certificate(merged), adapter, key="adapter_sha256")


def test_the_comparison_has_a_row_a_model(merged):
    columns, cells = comparison(read_certificate(merged))
    assert [row[:2] for row in cells] == [
        ["the adapter over the nf4 LLM", "0"],
        ["merged into the 16-bit LLM", "inf"],
        ["merged into the dequantized nf4 LLM (kept)", "0.002"],
        ["the LLM without the adapter", "2"],
    ]
    assert columns == ["", "KL (nats)", "same token", "largest difference", "KL from base", "mood.f1"]
    assert [row[-1] for row in cells] == ["0.700", "", "0.750", ""]
