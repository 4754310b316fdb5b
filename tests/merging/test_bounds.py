"""What decides whether a merge is kept: whose adapter it is, which candidate is closer, and the bounds."""

import json
import math
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
from certificate_files import certificate_content
from saved_adapter import BASE, saved_adapter

from finetune.common import certificate
from finetune.common.certificate import Bounds, Certificate, Dtypes, LanguageModelFiles, Measures, read_certificate
from finetune.common.errors import ArtifactError, MergeRefused
from finetune.common.run_folder import file_hash
from finetune.common.version import DISTRIBUTION, VERSION, versions
from finetune.merging import merge
from finetune.merging.candidates import Candidate
from finetune.recipe.schema import Llm

PLAIN, DEQUANTIZED = "the 16-bit LLM", "the dequantized nf4 LLM"
COMMIT, OTHER_COMMIT = "c" * 40, "d" * 40


def measures(kl=0.01, agreement=0.99, kl_from_base=1.0):
    return Measures(kl=kl, agreement=agreement, largest_logit_difference=0.1, kl_from_base=kl_from_base)


def trained(kl_from_base=1.0):
    return SimpleNamespace(measures=measures(0.0, 1.0, kl_from_base), base_measures=measures(), positions=200)


BOUNDS = Bounds(min_agreement=0.95, max_kl=0.1, min_kl_from_base=1e-6)


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        (measures(agreement=0.94), r"6\.0% of 200 positions \(KL 0\.01\); merge\.min_agreement is 0\.95"),
        (measures(kl=0.11), r"0\.11 nats .*200 positions\); merge\.max_kl is 0\.1"),
        (measures(kl=math.inf), r"inf nats"),
        (measures(kl=0, kl_from_base=0.9e-6), "equals the LLM without the adapter"),
        (measures(kl=0.05, kl_from_base=0.05), r"\(KL 0\.05\) than to the LLM without the adapter \(0\.05\)"),
        (measures(kl=0.05, kl_from_base=0.04), "lost in rounding"),
    ],
)
def test_beyond_any_bound_a_merge_is_refused_with_its_numbers(saved, words):
    with pytest.raises(MergeRefused, match=words) as caught:
        merge.refuse_unless_faithful(saved, trained(), BOUNDS, certificate.without_adapter("LLM"))
    assert "Nothing was kept" in str(caught.value)


def test_an_adapter_that_has_learned_nothing_is_refused():
    with pytest.raises(MergeRefused, match="equals the LLM without the adapter"):
        merge.refuse_unless_faithful(
            measures(0, 1, kl_from_base=1.0), trained(kl_from_base=0.9e-6), BOUNDS, certificate.without_adapter("LLM")
        )


@pytest.mark.parametrize("saved", [measures(agreement=0.95), measures(kl=0.1), measures(kl=0, kl_from_base=1e-6)])
def test_at_a_bound_a_merge_is_kept(saved):
    merge.refuse_unless_faithful(saved, trained(), BOUNDS, certificate.without_adapter("LLM"))
    merge.refuse_unless_faithful(saved, trained(kl_from_base=1e-6), BOUNDS, certificate.without_adapter("LLM"))


def test_bounds_are_the_recipes():
    section = SimpleNamespace(min_agreement=0.9, max_kl=0.2)
    bounds = merge.bounds_of(SimpleNamespace(merge=section))
    assert bounds == Bounds(min_agreement=0.9, max_kl=0.2, min_kl_from_base=1e-6)


def test_without_a_trained_adapter_the_untrained_model_is_named():
    with pytest.raises(MergeRefused, match="equals the untrained model: no stage trains the adapter"):
        merge.refuse_unless_faithful(measures(0, 1, kl_from_base=0), trained(), BOUNDS, certificate.UNTRAINED)


def test_the_closer_candidate_is_kept_and_both_divergences_are_told():
    near, far = measures(kl=0.002), measures(kl=0.03)
    for pair, best, other in (((near, far), PLAIN, DEQUANTIZED), ((far, near), DEQUANTIZED, PLAIN)):
        name, why = merge.chosen(dict(zip((PLAIN, DEQUANTIZED), pair, strict=True)))
        assert name == best
        assert why == f"its KL divergence from what was trained is 0.002 nats a token, that of {other} 0.03"


@pytest.mark.parametrize("kls", [(1e-7, 2e-7), (2e-7, 1e-7), (0.0, 0.0), (1e-6, 0.0), (0.0, 1e-6)])
def test_of_equally_close_candidates_the_published_llms_is_kept(kls):
    name, why = merge.chosen(dict(zip((PLAIN, DEQUANTIZED), map(measures, kls), strict=True)))
    assert name == PLAIN and "within 1e-06 nats of each other" in why


def test_a_candidate_that_is_closer_by_more_than_rounding_is_kept():
    assert merge.chosen({PLAIN: measures(2.1e-6), DEQUANTIZED: measures(1e-6)})[0] == DEQUANTIZED
    assert "KL divergence" in merge.chosen({PLAIN: measures(1e-6), DEQUANTIZED: measures(2.1e-6)})[1]


def test_of_an_llm_that_was_not_quantized_there_is_one_candidate():
    assert merge.chosen({PLAIN: measures()}) == (PLAIN, "it was trained as it is, unquantized: there is no other")


def base(**changes) -> Llm:
    return Llm(name=str(BASE / "llm"), quantize="none").model_copy(update=changes)


def adapter_folder(tmp_path, **llm) -> Path:
    """The saved adapter; `llm`: what its manifest says of the LLM that it was trained over."""
    folder = saved_adapter(tmp_path)
    content = json.loads((folder / "multimodal.json").read_text())
    hashes = llm.pop("sha256", {})
    content["model"]["llm"] |= llm
    content["llm_sha256"] = hashes
    (folder / "multimodal.json").write_text(json.dumps(content))
    return folder


def test_a_local_llm_is_named_with_the_hashes_of_its_weights(tmp_path):
    weights = BASE / "llm" / "model.safetensors"
    folder = adapter_folder(tmp_path, sha256={weights.name: file_hash(weights)})
    expected = LanguageModelFiles(name="llm", revision=None, sha256={weights.name: file_hash(weights)})
    assert merge.checked_adapter(folder, base()) == expected
    moved = shutil.copytree(BASE / "llm", tmp_path / "elsewhere" / "llm")
    assert merge.checked_adapter(folder, base(name=str(moved), revision=COMMIT)) == expected


def test_an_llm_of_the_hub_is_named_by_its_id_and_commit(tmp_path):
    folder = adapter_folder(tmp_path, name="org/llm", revision=COMMIT, sha256={"model.safetensors": "ab" * 32})
    for revision in (COMMIT, None):
        files = merge.checked_adapter(folder, base(name="org/llm", revision=revision))
        assert files == LanguageModelFiles(name="org/llm", revision=COMMIT, sha256={})


@pytest.mark.parametrize(
    ("llm", "words"),
    [
        ({"name": "fork/llm"}, r"LLM 'org/llm' \(none\), but the run's recipe names 'fork/llm' \(none\)"),
        ({"quantize": "nf4"}, r"'org/llm' \(none\), .* 'org/llm' \(nf4\)"),
        ({"revision": OTHER_COMMIT}, r"'org/llm' at cccccccccccc \(none\), .* 'org/llm' at dddddddddddd \(none\)"),
        ({"name": "a/b", "revision": OTHER_COMMIT}, r"'org/llm' \(none\), .* 'a/b' \(none\): this adapter is another"),
    ],
)
def test_an_adapter_of_another_llm_is_refused_with_both(llm, words, tmp_path):
    folder = adapter_folder(tmp_path, name="org/llm", revision=COMMIT)
    with pytest.raises(ArtifactError, match=words):
        merge.checked_adapter(folder, base(**({"name": "org/llm", "revision": COMMIT} | llm)))


def test_a_folder_of_another_name_is_another_llm(tmp_path):
    folder = adapter_folder(tmp_path, name="/gone/other")
    with pytest.raises(ArtifactError, match="trained over the LLM '/gone/other'"):
        merge.checked_adapter(folder, base())


def test_weights_that_have_changed_since_are_named_with_both_hashes(tmp_path):
    weights = BASE / "llm" / "model.safetensors"
    folder = adapter_folder(tmp_path, sha256={weights.name: "ab" * 32})
    words = rf"{weights.name} isn't .*\(sha256 {file_hash(weights)[:12]}, then abababababab\)"
    with pytest.raises(ArtifactError, match=words):
        merge.checked_adapter(folder, base())
    folder = adapter_folder(tmp_path / "more", sha256={weights.name: file_hash(weights), "gone.safetensors": "cd" * 32})
    with pytest.raises(ArtifactError, match=r"gone.safetensors isn't .*\(sha256 none, then cdcdcdcdcdcd\)"):
        merge.checked_adapter(folder, base())


def test_an_adapter_without_its_projectors_is_refused(tmp_path):
    folder = adapter_folder(tmp_path)
    (folder / "projectors.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"projectors.safetensors is missing"):
        merge.checked_adapter(folder, base())


class Job:
    """A merge of two candidates of known measures, which writes files of known content."""

    def __init__(self, folder, kls):
        self.kls = dict(zip((PLAIN, DEQUANTIZED), kls, strict=True))
        self.candidates = (Candidate(PLAIN, False), Candidate(DEQUANTIZED, True))
        recipe = SimpleNamespace(adapter="LoRA", merge=SimpleNamespace(min_agreement=0.95, max_kl=0.1))
        self.run = SimpleNamespace(recipe=recipe, folder=SimpleNamespace(adapter=folder))
        self.reference, self.dtype = "the adapter over the nf4 LLM", "torch.bfloat16"
        self.base_is = certificate.without_adapter("LLM")
        self.dtypes = Dtypes(llm="nf4", computed="float32", merged="bfloat16")

    def measure_trained(self, comparison):
        return trained()

    def write(self, place, scratch, trained, quantized):
        name = DEQUANTIZED if quantized else PLAIN
        for folder in (place, scratch):
            folder.mkdir()
            (folder / "model.safetensors").write_text(name)
        return f"how {name}"

    def measure(self, place, scratch, comparison, trained):
        assert (scratch / "model.safetensors").is_file()
        return measures(self.kls[(place / "model.safetensors").read_text()])


COMPARISON = SimpleNamespace(samples=[1, 2, 3], answered=[1], media={"image": 3}, primary={"caption": "bleu"})


@pytest.mark.parametrize(("kls", "best"), [((0.002, 0.03), PLAIN), ((0.03, 0.002), DEQUANTIZED)])
def test_the_folder_holds_the_closer_candidate_and_a_certificate_of_it(kls, best, tmp_path):
    folder, adapter = tmp_path / "merged", tmp_path / "adapter"
    for path in (folder, adapter):
        path.mkdir()
    (adapter / "adapter_model.safetensors").write_text("LoRA")
    llm = LanguageModelFiles(name="org/llm", revision=COMMIT, sha256={})
    merged = merge.merge_into(folder, Job(adapter, kls), COMPARISON, llm, held_out=70)
    assert sorted(path.name for path in folder.iterdir()) == [certificate.NAME, "model.safetensors"]
    assert (folder / "model.safetensors").read_text() == merged.merged_into == best
    assert merged.how == f"how {best}" and "0.002" in merged.why
    assert {name: candidate.kl for name, candidate in merged.candidates.items()} == {PLAIN: kls[0], DEQUANTIZED: kls[1]}
    assert merged.saved == merged.candidates[best] and merged.trained == trained().measures
    assert merged.base == trained().base_measures and merged.positions == 200
    assert (merged.rows, merged.rows_scored, merged.rows_held_out) == (3, 1, 70)
    assert (merged.media, merged.primary, merged.language_model) == ({"image": 3}, {"caption": "bleu"}, llm)
    assert (merged.dtype, merged.dtypes.llm, merged.bounds) == ("bfloat16", "nf4", BOUNDS)
    assert merged.reference == "the adapter over the nf4 LLM" and merged.format == 1
    assert set(merged.versions) == {DISTRIBUTION, *merge.PACKAGES} and all(merged.versions.values())
    certificate.verify(merged, folder)
    certificate.verify(merged, adapter, key="adapter_sha256")
    assert read_certificate(folder) == merged


def test_a_merge_beyond_its_bounds_writes_no_certificate(tmp_path):
    with pytest.raises(MergeRefused, match=r"merge.max_kl is 0\.1"):
        merge.merge_into(tmp_path, Job(tmp_path, (0.3, 0.2)), COMPARISON, None, held_out=70)
    assert not (tmp_path / certificate.NAME).exists()


def test_what_was_measured_is_shown_as_a_table(monkeypatch):
    monkeypatch.setattr(merge.console, "width", 200)
    with merge.console.capture() as capture:
        merge.show(Certificate.model_validate(certificate_content()), Path("runs/[x]/merged"))
    text = capture.get()
    header = next(line for line in text.splitlines() if PLAIN in line)
    assert f"{DEQUANTIZED} (kept)" in header
    cells = {line.split("  ")[0].strip(): line.split()[-4:] for line in text.splitlines()}
    assert cells["KL (nats)"] == ["0", "inf", "0.002", "2"]
    words = " ".join(text.split())
    assert "merged into the dequantized nf4 LLM: 99.0% of 145 next tokens as trained; it is closer; scores" in words
    assert "scores on 64 of 70 held-out rows; runs/[x]/merged" in words


def test_a_package_that_is_not_installed_has_its_version(monkeypatch):
    def version(name: str) -> str:
        if name == DISTRIBUTION:
            raise PackageNotFoundError
        return "1"

    monkeypatch.setattr("importlib.metadata.version", version)
    assert versions(["torch"]) == {DISTRIBUTION: VERSION, "torch": "1"}
