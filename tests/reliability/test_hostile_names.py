"""Names of runs, repositories and files that somebody else has chosen: refused in a line, or used as they are; nothing
is written elsewhere, and no shell sees them.
"""

import ast
import json
import re
from pathlib import Path

import pytest
from cli import cli
from imports import MODULES
from recipe_texts import GOOD

pytestmark = pytest.mark.slow

NAMES = {
    "a folder above": "../up",
    "folders above in its middle": "a/../../up",
    "above alone": "..",
    "absolute": "/dev/null/x",
    "a device": "/dev/null",
    "of a process": "/proc/self/mem/x",
    "the root": "/",
    "nothing": "",
    "a line break": "a\nb",
    "an escape sequence": "a\x1b[2Jb",
    "another direction": "\u202egnp",
    "a byte that isn't UTF-8": "\udcff",
    "of a device on Windows": "CON",
    "a drive": "C:\\x",
    "a share": "\\\\host\\share",
    "an emoji": "🙂",
    "300 characters": "x" * 300,
    "5,000 characters": "x" * 5000,
    "a leading dash": "-rf",
    "an option": "--help",
    "a command": "$(touch pwned)",
    "a command in quotes": "`touch pwned`",
    "a second command": "; touch pwned",
    "an address": "http://127.0.0.1:9/x",
    "escaped dots": "%2e%2e%2fup",
    "a user above": "user/../other",
}
DOORS = (
    "train x.yaml --run=@",
    "run x.yaml --run=@",
    "evaluate -- @",
    "merge -- @",
    "chat runs/calls hi --image=@",
    "chat -- @",
    "serve -- @",
    "report -- @",
    "predict -- @ x.yaml",
    "predict runs/calls x.yaml --out=@",
    "export runs/calls --to gguf --out=@",
    "export --to gguf -- @",
    "push --dry-run -- @",
    "push runs/calls --repo=@",
    "pull -- @",
    "pull org/x --to=@",
    "data check x.yaml --out=@",
    "data label x.yaml --run=@",
    "init data/products.csv --yes --name=@",
    "check x.yaml --set name=@",
)
SHARE = 5  # of names by doors that are tried where not all are
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A recipe without rows, and a run as far as its texts tell."""
    work = tmp_path / "outer" / "work"
    calls = work / "runs" / "calls"
    (calls / "adapter").mkdir(parents=True)
    (work / "data").mkdir()
    (work / "data" / "products.csv").write_text("image,caption\n")
    (work / "x.yaml").write_text(GOOD)
    (calls / "recipe.yaml").write_text(GOOD)
    manifest = {
        "format": 1,
        "model": {"llm": {"name": "org/llm"}},
        "bindings": {"kind": {"task": "classify", "head": "language"}},
        "modules": {"llm_class": "Llm", "shapes": {}},
    }
    (calls / "adapter" / "multimodal.json").write_text(json.dumps(manifest))
    monkeypatch.chdir(work)
    return work


def test_a_hostile_name_is_refused_in_a_line(project, full, tried):
    pairs = [(door, name) for door in DOORS for name in NAMES.values()]
    for door, name in pairs if full else pairs[::SHARE]:
        done = cli(*(word.replace("@", name) for word in door.split()))
        said = done.stdout + done.stderr
        assert done.returncode in (1, 2), (door, name, said)
        assert said.strip() and "Traceback" not in said and not COMMANDS.search(said), (door, name, said)
    assert not [path for path in project.parent.parent.rglob("*") if path.name == "pwned"]
    outside = {path.name for path in project.parent.iterdir()} - {"work"}
    assert outside <= {"up", ".up.lock"}  # where `../up` is
    assert Path("/dev/null").is_char_device()
    tried(f"{len(NAMES)} hostile names by {len(DOORS)} doors", "refused in a line, or used as they are; no shell")


def test_no_shell_is_started(tried):
    """By no function that takes a command line as text."""
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput")
                shell = [word.value for word in node.keywords if word.arg == "shell"]
                assert all(isinstance(value, ast.Constant) and value.value is False for value in shell), (path, called)
    tried(f"shell=True in {len(MODULES)} modules", "nowhere")
