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
    hashed_files,
    read_certificate,
    read_verified,
    verify,
    verify_if_certified,
    weights_hashes,
)
from finetune.common.errors import ArtifactError
from finetune.common.run_folder import RunFolder, file_hash


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
    text = (tmp_path / "copy.json").read_text(encoding="utf-8")
    assert json.loads(text) == before and text == json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"
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
    with pytest.raises(ArtifactError) as error:
        verify_if_certified(merged)
    hashes = file_hash(merged / name)[:12], certificate.sha256[name][:12]
    assert str(error.value) == (
        f"{merged / name}: sha256 {hashes[0]}..., certified is {hashes[1]}...: the certificate belongs to other "
        "weights, or the folder is damaged: copy it again, or merge again"
    )
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


def test_a_run_s_merged_model_is_checked_and_its_adapter_if_it_is_there(merged, tmp_path):
    run = RunFolder(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "adapter_model.safetensors").write_bytes(b"trained")
    content = certificate_content(
        sha256=file_hashes(merged), adapter_sha256={"adapter_model.safetensors": hashlib.sha256(b"trained").hexdigest()}
    )
    run.certificate.write_text(json.dumps(content))
    assert read_verified(run) == read_certificate(run.certificate)  # no adapter/
    (tmp_path / "elsewhere").rename(run.adapter)
    assert read_verified(run) == read_certificate(run.certificate)
    (run.adapter / "adapter_model.safetensors").write_bytes(b"trained again")
    with pytest.raises(ArtifactError, match=r"adapter/adapter_model\.safetensors: sha256"):
        read_verified(run)
    (merged / "config.json").write_bytes(b"[]")
    with pytest.raises(ArtifactError, match=r"merged/config\.json: sha256"):
        read_verified(run)


def test_a_model_s_files_are_those_that_publishing_does_not_add(tmp_path):
    names = {"b.safetensors", "a/tokenizer.json", "a/samples"}
    for name in (*names, "certificate.json", "a/README.md", ".cache/x", "a/.lock", "recipe.yaml", "samples/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert hashed_files(tmp_path) == [tmp_path / name for name in sorted(names)]
    assert file_hashes(tmp_path) == {name: hashlib.sha256(name.encode()).hexdigest() for name in names}


def test_an_llm_s_weights_have_hashes_if_they_are_here(tmp_path):
    for name in ("2.safetensors", "1.safetensors", "model.gguf", "config.json"):
        (tmp_path / name).write_text(name)
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("1.safetensors", "2.safetensors")}
    assert weights_hashes(str(tmp_path)) == hashes
    assert weights_hashes(str(tmp_path / "model.gguf")) == {"model.gguf": hashlib.sha256(b"model.gguf").hexdigest()}
    assert weights_hashes("organization/model") == {}


def test_it_shows_what_was_kept(merged):
    certificate = read_certificate(merged)
    text = (
        "Certificate: merged into the dequantized nf4 LLM; 99.0% of 145 next tokens as trained, KL 0.002 nats, "
        "on 64 of 70 held-out rows"
    )
    assert repr(certificate) == text
    html = certificate._repr_html_()
    assert html.startswith(f"<p>{text}</p><table>") and "<td>merged into the dequantized nf4 LLM (kept)</td>" in html


def test_the_comparison_has_a_row_a_model(merged):
    content = json.loads((merged / "certificate.json").read_text())
    content["base"] |= {"largest_logit_difference": 1e-5, "kl_from_base": 2e-7, "scores": {"mood": {"f1": None}}}
    content["trained"]["scores"]["words"] = {"accuracy": 1.0}  # its main metric is another
    (merged / "certificate.json").write_text(json.dumps(content))
    columns, cells = comparison(read_certificate(merged))
    assert [row[:-1] for row in cells] == [
        ["the adapter over the nf4 LLM", "0", "100.0%", "0.3", "1.5"],
        ["merged into the 16-bit LLM", "inf", "99.0%", "0.3", "1.5"],
        ["merged into the dequantized nf4 LLM (kept)", "0.002", "99.0%", "0.3", "1.5"],
        ["the LLM without the adapter", "2", "99.0%", "1e-05", "2e-07"],
    ]
    assert columns == ["", "KL (nats)", "same token", "largest difference", "KL from base", "mood.f1"]
    assert [row[-1] for row in cells] == ["0.700", "", "0.750", ""]
