"""A run merged with its certificate: what it says is so, and a merge that fails or is cut leaves what there was."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_recipe
from trained_runs import copy_of, file_digests, trained

import finetune
from finetune.common.certificate import Dtypes, read_certificate, verify
from finetune.common.errors import ArtifactError, MergeRefused
from finetune.data.rows import read_splits, subset
from finetune.merging import candidates, merged_folder

pytestmark = pytest.mark.slow

FUSION = {"kind": "cross_attention", "every": 1, "heads": 2, "head_width": 8, "gate": 0.7}


def trained_over(folder: Path, quantize: str = "nf4", **changes) -> Path:
    return trained(tiny_recipe(folder, model__llm={"name": str(folder / "llm"), "quantize": quantize}, **changes))


@pytest.fixture(scope="module")
def run(finished_run):
    """A run over nf4 weights with 70 held-out rows, merged."""
    return finished_run("nf4")


def few_rows(run: Path, to: Path) -> Path:
    """A copy to be spoilt; merged again, it is compared on a few rows."""
    other = copy_of(run, to, "checkpoints")
    text = (other / "recipe.yaml").read_text()
    few = text.replace("  rows: 64\n", "  rows: 6\n").replace("rows_scored: 64", "rows_scored: 1")
    assert few != text
    (other / "recipe.yaml").write_text(few)
    return other


def change_config(run: Path, name: str, **changes) -> None:
    path = run / "adapter" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil(run: Path, change) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path)


def test_at_least_64_rows_and_all_that_is_promised(run):
    certificate = read_certificate(run)
    verify(certificate, run / "merged")
    verify(certificate, run / "adapter", key="adapter_sha256")
    assert (certificate.rows, certificate.rows_held_out, certificate.media) == (64, 70, {"image": 64})
    assert certificate.dtypes == Dtypes(llm="nf4", computed="float32", merged="float32")
    assert certificate.how == "module by module, from the LLM's files"
    assert list(certificate.candidates) == ["the 16-bit LLM", "the dequantized nf4 LLM"]
    assert certificate.versions["torch"] == torch.__version__
    for measures in (certificate.trained, certificate.base, *certificate.candidates.values()):
        assert "accuracy" in measures.scores["classify"] and measures.not_scored is None
    plain, dequantized = certificate.candidates.values()
    assert dequantized.kl < 1e-5 < plain.kl and certificate.merged_into == "the dequantized nf4 LLM"
    assert certificate.saved == dequantized and f"{plain.kl:.2g}" in certificate.why


def conversations(run: Path) -> list[tuple]:
    """(messages, label) of the rows that a merge compares."""
    recipe = finetune.load_recipe(run / "recipe.yaml")
    samples = subset(read_splits(recipe.data, recipe.seed).test, 64, recipe.seed)
    return [(sample.question, sample.answer) for sample in samples]


def test_measures_are_those_of_the_folders_loaded_afresh(run):
    """By other code: whole conversations through both models, and torch's own KL divergence, in float64."""
    certificate = read_certificate(run)
    merged, adapter = finetune.load(run / "merged"), finetune.load(run / "adapter")
    asked = conversations(run)
    divergences, same, said = [], [], {merged: [], adapter: []}
    for messages, target in asked:
        batch = adapter.batch([messages])
        answer = torch.tensor([adapter.tokenizer(f"{target}<|im_end|>", add_special_tokens=False)["input_ids"]])
        ids = torch.cat([batch.input_ids, answer], 1)
        with torch.no_grad():
            logits = [
                m.model(ids, features=batch.features).logits[0, -answer.shape[1] - 1 : -1].double()
                for m in (merged, adapter)
            ]
        ours, theirs = (one.log_softmax(-1) for one in logits)
        divergences += torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).tolist()
        same += (ours.argmax(-1) == theirs.argmax(-1)).tolist()
        for model, right in said.items():
            right.append(model.answers([messages], max_new_tokens=4)[0] == target)
    assert certificate.positions == len(same)
    assert certificate.saved.agreement == pytest.approx(sum(same) / len(same), abs=1e-6)
    assert certificate.saved.kl == pytest.approx(sum(divergences) / len(divergences), abs=1e-6)
    for measures, right in ((certificate.saved, said[merged]), (certificate.trained, said[adapter])):
        assert measures.scores["classify"]["accuracy"] == pytest.approx(sum(right) / 64, abs=1e-3)


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_a_model_that_does_not_fit_is_compared_from_disk(fusion, run, tmp_path, monkeypatch):
    if fusion == "prefix":
        run = few_rows(run, tmp_path)
    else:
        stages = [{"name": "tune", "trains": ["projectors", "adapter", "fusion"], "learning_rate": 5.0e-3}]
        bounds = {"max_kl": 10, "min_agreement": 0}
        run = trained_over(tmp_path, model__fusion=FUSION, train__stages=stages, merge={"rows": 8, **bounds})
    within = finetune.merge(run)
    monkeypatch.setattr(candidates, "ROOM", 1e12)
    beyond = finetune.merge(run)
    assert beyond.sha256 == within.sha256
    for name, measures in within.candidates.items():
        other = beyond.candidates[name]
        for key in ("kl", "agreement", "largest_logit_difference", "kl_from_base"):
            assert getattr(other, key) == pytest.approx(getattr(measures, key), abs=1e-4), (name, key)
        assert other.scores is None and "memory has no room" in other.not_scored
    assert not list(run.glob("*.partial")) and not (run / "merged" / "scratch").exists()


@pytest.mark.parametrize(
    ("kind", "on_gpu", "in_memory", "place"),
    [("cuda", 121, 0, "cuda"), ("cuda", 119, 121, "cpu"), ("cuda", 119, 119, None), ("cpu", 121, 121, "cpu")],
)
def test_a_merged_model_is_read_back_where_there_is_room(kind, on_gpu, in_memory, place, tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (on_gpu, 1000))
    monkeypatch.setattr(candidates.psutil, "virtual_memory", lambda: SimpleNamespace(available=in_memory))
    found = candidates.place_for(tmp_path, torch.device(kind))
    assert found == (None if place is None else torch.device(place))


def test_shards_of_a_merged_folder_are_one_model(run, tmp_path, monkeypatch):
    monkeypatch.setattr(merged_folder, "SHARD_BYTES", 50_000)
    other = few_rows(run, tmp_path)
    certificate = finetune.merge(other)
    index = json.loads((other / "merged" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert all((other / "merged" / name).stat().st_size < 120_000 for name in set(index["weight_map"].values()))
    whole = load_file(run / "merged" / "model.safetensors")
    parts = {k: v for name in set(index["weight_map"].values()) for k, v in load_file(other / "merged" / name).items()}
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert set(certificate.sha256) > {"model.safetensors.index.json", *index["weight_map"].values()}
    picture = run.parent / "data" / "images" / "test0.png"
    one, two = (finetune.load(folder / "merged").answer("What?", image=picture) for folder in (run, other))
    assert one == two


def test_an_initialisation_by_chance_is_merged_whole(tmp_path):
    stage = {"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 5.0e-3}
    changes = {"train__stages": [stage], "merge": {"rows": 4, "rows_scored": 0}}
    run = trained_over(tmp_path, quantize="none", adapter__initialization="pissa_niter_4", **changes)
    certificate = finetune.merge(run)
    assert certificate.how.startswith("all at once, in memory: 'pissa_niter_4'")
    assert certificate.saved.kl < 1e-5 < certificate.saved.kl_from_base
    assert certificate.saved.scores is None and certificate.rows_scored == 0


def assert_only_the_reason_is_written(run: Path, before: dict[str, str]) -> None:
    changed = {name for name, digest in file_digests(run).items() if before.pop(name, None) != digest}
    assert (changed, {*before}) == ({"metrics.json"}, set())
    assert json.loads((run / "metrics.json").read_text())["merge"]["refused"].startswith("the merged model")


def test_a_refused_merge_leaves_the_older_one(run, tmp_path):
    other = few_rows(run, tmp_path)
    spoil(other, lambda name, tensor: torch.zeros_like(tensor) if "lora_B" in name else tensor)
    before = file_digests(other)
    with pytest.raises(MergeRefused, match="equals the LLM without the adapter"):
        finetune.merge(other)
    assert_only_the_reason_is_written(other, before)


def test_the_bound_of_the_divergence_is_kept(run, tmp_path):
    other = few_rows(run, tmp_path)
    text = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(
        text.replace("max_kl: 0.1", "max_kl: 1.0e-12").replace("dtype: auto", "dtype: bfloat16")
    )
    before = file_digests(other)
    with pytest.raises(MergeRefused, match=r"merge.max_kl is 1e-12"):
        finetune.merge(other)
    assert_only_the_reason_is_written(other, before)


def merge_and_be_killed(run: Path) -> None:
    close, seen = merged_folder.Shards.close, []

    def close_or_die(shards):
        seen.append(shards)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        close(shards)

    merged_folder.Shards.close = close_or_die
    finetune.merge(run)


def test_a_merge_that_is_killed_leaves_nothing_half_written(run, tmp_path):
    """Killed while the second candidate is written; the next merge clears up and ends on the same weights."""
    other = few_rows(run, tmp_path)
    kept = file_digests(other)
    process = multiprocessing.get_context("fork").Process(target=merge_and_be_killed, args=(other,))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL and (other / "merged.partial").is_dir()
    left = {name: digest for name, digest in file_digests(other).items() if not name.startswith("merged.partial/")}
    assert left == kept
    finetune.merge(other)
    assert not (other / "merged.partial").exists()
    verify(read_certificate(other), other / "merged")
    assert read_certificate(other).sha256["model.safetensors"] == kept["merged/model.safetensors"]


def test_an_adapter_of_another_llm_is_named(run, tmp_path):
    other = few_rows(run, tmp_path)
    known = json.loads((other / "adapter" / "multimodal.json").read_text())["model"]
    change_config(other, "multimodal.json", model=known | {"llm": known["llm"] | {"name": "org/another"}})
    with pytest.raises(ArtifactError, match=r"trained over the LLM 'org/another' \(nf4\), but the run's recipe names"):
        finetune.merge(other)
    change_config(other, "multimodal.json", model=known)
    spoil(other, lambda name, tensor: tensor[:, :-1].contiguous() if "q_proj.lora_A" in name else tensor)
    with pytest.raises(ArtifactError, match=r"doesn't fit the model.*other shape: .*q_proj.lora_A"):
        finetune.merge(other)


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("adapter_model.safetensors", "missing", "is missing"),
        ("adapter_model.safetensors", "cut", "is damaged"),
        ("projectors.safetensors", "missing", "is missing"),
        ("projectors.safetensors", "cut", "is damaged"),
        ("adapter_config.json", "missing", "is missing"),
        ("adapter_config.json", "cut", "is damaged"),
        ("multimodal.json", "missing", "is missing"),
        ("multimodal.json", "cut", "is damaged"),
    ],
)
def test_damaged_files_are_named_and_nothing_is_written(run, tmp_path, name, damage, told):
    other = few_rows(run, tmp_path)
    path = other / "adapter" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    before = file_digests(other)
    with pytest.raises(ArtifactError, match=f"{name} {told}"):
        finetune.merge(other)
    assert file_digests(other) == before


def test_a_run_that_never_ended_says_so(run, tmp_path):
    shutil.copy(run / "recipe.yaml", tmp_path / "recipe.yaml")
    with pytest.raises(
        ArtifactError, match=r"no adapter here: its training hasn't finished; finetune.train\(.*resume=True\) goes"
    ):
        finetune.merge(tmp_path)
    with pytest.raises(ArtifactError, match=r"no such run or folder"):
        finetune.merge(tmp_path / "nowhere")


def test_a_disk_without_room_is_told_before_anything_is_written(run, tmp_path, monkeypatch):
    other = few_rows(run, tmp_path)
    before = file_digests(other)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ArtifactError, match=r"0.0 GiB are free, a merged model takes"):
        finetune.merge(other)
    assert file_digests(other) == before
