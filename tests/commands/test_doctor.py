"""Each fault is made, and found, with what mends it."""

import json
import shutil
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import av
import bitsandbytes
import numpy
import peft.import_utils
import pytest
import torch
from cli import cli
from hub_server import READ_TOKEN
from loopback import asked_of, hub_on_loopback

import finetune
from finetune.commands._doctor import device, packages, surroundings
from finetune.commands._doctor.finding import Check
from finetune.common import hub as reach

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def only(check):
    (diagnostic,) = check()
    return diagnostic


def requiring(monkeypatch, *lines):
    monkeypatch.setattr(packages, "requires", lambda name: list(lines))
    real = packages.installed
    monkeypatch.setattr(packages, "installed", lambda name: "0.1.0" if name == packages.DISTRIBUTION else real(name))


def test_the_command_prints_diagnostics_and_its_status_says_whether_one_is_an_error():
    done = cli("doctor", "--json")
    diagnostics = json.loads(done.stdout)["diagnostics"]
    assert {"python", "packages", "device", "bitsandbytes", "memory", "disk", "hub"} <= {
        c["subject"] for c in diagnostics
    }
    assert done.returncode == any(c["level"] == "error" for c in diagnostics)
    assert all(c["fix"] for c in diagnostics if c["level"] != "ok")
    assert not done.stderr


def test_without_torch_and_bitsandbytes_there_are_errors_and_no_traceback(monkeypatch):
    for name in ("torch", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, name, None)
    done = cli("doctor")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "error    device: ModuleNotFoundError: import of torch halted" in done.stdout
    assert "error    bitsandbytes: ModuleNotFoundError: import of bitsandbytes halted" in done.stdout
    assert "install torch again" in done.stdout
    diagnosis = finetune.doctor()
    assert not diagnosis.healthy and {c.level for c in diagnosis.diagnostics if c.subject == "disk"} == {"ok"}


def test_what_a_check_raises_is_one_more_condition():
    def check():
        yield packages.Diagnostic("a", "ok", "seen")
        raise RuntimeError("\n  libcuda is missing\nmore")

    found = Check("a", check, "fix it").diagnostics()
    assert [(c.level, c.seen, c.fix) for c in found[1:]] == [("error", "RuntimeError: libcuda is missing", "fix it")]
    assert found[0].seen == "seen"


def test_versions_are_compared_with_the_metadata(monkeypatch):
    requiring(monkeypatch, "numpy>=1", "torch<2", "no-such-package>=3", "gradio-of-the-future>=9; extra == 'label'")
    old, missing = packages.required()
    assert old.level == missing.level == "error"
    assert (old.seen, old.fix) == (f"torch {torch.__version__} is installed, <2 is required", "pip install 'torch<2'")
    assert (missing.seen, missing.fix) == ("no-such-package isn't installed", "pip install 'no-such-package>=3'")
    extra = only(packages.extras)
    assert extra.level == "ok" and extra.fix == "pip install 'finetune-kit[label]'"
    assert "gradio-of-the-future isn't installed" in extra.seen and "data label --page" in extra.seen
    requiring(monkeypatch, "numpy>=1")
    assert only(packages.required).level == "ok" and not list(packages.extras())


def test_what_each_extra_is_for_is_known():
    extras = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert packages.EXTRAS.keys() == extras.keys() - {"dev"}


def test_a_package_replaced_under_a_running_kernel_is_found(monkeypatch):
    assert not list(packages.replaced())
    monkeypatch.setattr(numpy, "__version__", "1.2.3")
    found = only(packages.replaced)
    assert (found.subject, found.level) == ("numpy", "error") and found.seen.startswith("1.2.3 is loaded, ")
    assert "restart" in found.fix


@pytest.mark.parametrize(("version", "level"), [("0.10.0", "error"), ("0.99.0", "ok")])
def test_a_torchao_that_peft_refuses_is_found(version, level, monkeypatch, tmp_path):
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").touch()
    (tmp_path / f"torchao-{version}.dist-info").mkdir()
    (tmp_path / f"torchao-{version}.dist-info" / "METADATA").write_text(f"Name: torchao\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    peft.import_utils.is_torchao_available.cache_clear()
    try:
        found = only(packages.torchao)
    finally:
        peft.import_utils.is_torchao_available.cache_clear()
    assert found.level == level and version in found.seen
    assert found.fix.startswith("pip uninstall torchao") == (level == "error")


def gpu(monkeypatch, name, capability, ones=lambda *_, **__: torch.zeros(2, 2)):
    for key, value in {
        "is_available": True,
        "device_count": 1,
        "get_device_name": name,
        "get_device_capability": capability,
        "is_bf16_supported": True,
    }.items():
        monkeypatch.setattr(torch.cuda, key, lambda *_, value=value: value)
    monkeypatch.setattr(torch, "ones", ones)
    return only(device.device)


def test_a_gpu_that_emulates_bfloat16_is_said_to_compute_in_float16(monkeypatch):
    found = gpu(monkeypatch, "Tesla T4", (7, 5))
    assert found.level == "ok" and "float16; torch says that it has bfloat16, but emulates it" in found.seen
    found = gpu(monkeypatch, "NVIDIA L4", (8, 9))
    assert found.level == "ok" and found.seen.endswith(": bfloat16")


def test_a_gpu_that_torch_has_no_kernels_for_is_an_error(monkeypatch):
    def ones(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")

    found = gpu(monkeypatch, "Tesla K80", (3, 7), ones)
    assert found.level == "error" and "no kernel image is available" in found.seen and "build of torch" in found.fix


def test_a_driver_without_a_gpu_build_of_torch_is_found(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", None)
    first, *_ = device.device()
    assert first.level == "warning" and "was built without CUDA" in first.seen


def test_a_quantized_layer_that_computes_wrongly_is_an_error(monkeypatch):
    assert only(device.quantized).level == "ok"
    real = bitsandbytes.nn.Linear4bit.forward
    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", lambda self, x: 1.1 * real(self, x))
    found = only(device.quantized)
    assert found.level == "error" and "is off by 10%" in found.seen and "quantize: none" in found.fix


@pytest.mark.parametrize(("free", "level"), [(2**40, "ok"), (2**30, "warning"), (2**20, "error")])
def test_little_space_on_a_disk_is_said(free, level, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    found = list(surroundings.disk())
    assert [diagnostic.level for diagnostic in found] == [level] * 3
    assert [("HF_HOME" in c.fix, "TMPDIR" in c.fix) for c in found[1:]] == [
        (level != "ok", False),
        (False, level != "ok"),
    ]


@pytest.mark.parametrize(
    ("token", "level", "seen"),
    [
        (READ_TOKEN, "ok", "logged in as me"),
        ("hf_" + "x" * 34, "error", "the token isn't valid"),
        (None, "ok", "no token"),
    ],
)
def test_the_hub_is_asked_whose_token_this_is(token, level, seen, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with hub_on_loopback() as server, asked_of(server, monkeypatch, tmp_path / "cache", token):
        reach._unreachable.cache_clear()
        reached, found = surroundings.hub()
    assert reached.level == "ok" and server.url in reached.seen
    assert found.level == level and seen in found.seen and ("hf auth login" in found.fix) == (seen != "logged in as me")
    with asked_of(SimpleNamespace(url="http://127.0.0.1:9"), monkeypatch, tmp_path / "cache", token):
        found = only(surroundings.hub)
    reach._unreachable.cache_clear()
    assert found.level == "warning" and "HF_ENDPOINT" in found.fix


def test_codecs_that_are_missing_are_named(monkeypatch):
    assert only(surroundings.codecs).level == "ok"
    monkeypatch.setattr(surroundings, "DECODERS", ("h264", "no_such_codec"))
    found = only(surroundings.codecs)
    assert found.level == "warning" and found.seen == f"PyAV {av.__version__} can't decode no_such_codec"


def test_engines_are_examined_only_where_they_are_named(monkeypatch, tmp_path):
    monkeypatch.delenv("FINETUNE_VLLM", raising=False)
    monkeypatch.delenv("FINETUNE_LLAMA_CPP", raising=False)
    assert not list(surroundings.engines())
    monkeypatch.setenv("FINETUNE_VLLM", str(tmp_path / "python"))
    monkeypatch.setenv("FINETUNE_LLAMA_CPP", str(tmp_path))
    vllm, llama_cpp = surroundings.engines()
    assert vllm.level == llama_cpp.level == "error"
    assert "doesn't exist" in vllm.seen and "convert_hf_to_gguf.py" in llama_cpp.seen
