"""Pin what the notebooks install in Colab: `python notebooks/lock.py [FREEZE]`, with uv on the PATH.

FREEZE is Colab's own `pip freeze`; without it, it is downloaded from googlecolab/backend-info. Of Colab's packages,
colab-versions.txt keeps those that the kit needs. colab-lock.txt has what must differ from them or be added. uv prefers
Colab's versions, as if they were an earlier lock, and can't change those of KEPT.
"""

import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
FREEZE = "https://raw.githubusercontent.com/googlecolab/backend-info/main/pip-freeze.gpu.txt"
PYTHON = "3.13"
OLDEST = "3.11"  # of the kit: the same lock is tried there
# torch, and what a fresh Colab kernel has imported: replacing these needs a restart.
KEPT = ("torch", "torchvision", "numpy", "pillow", "pydantic", "pydantic-core", "rich", "psutil", "ipykernel")
REMOVED = "torchao"  # PEFT refuses Colab's version, and the kit doesn't use it
VERSIONS_HEADER = f"# Packages of Colab that matter to the kit, Python {PYTHON}; written by lock.py\n"
LOCK_HEADER = "# Installed over Colab's packages with `pip install --no-deps`; written by lock.py\n"


def pins(text: str) -> dict[str, str]:
    """{normalized name: version}, of lines as `name==version`."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, flags=re.MULTILINE)
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in found}


def resolve(colab: dict[str, str]) -> dict[str, str]:
    """What the kit needs in Colab, {name: version}."""
    with tempfile.TemporaryDirectory() as folder:
        kept, lock = Path(folder, "kept.txt"), Path(folder, "lock.txt")
        public = {name: version.partition("+")[0] for name, version in colab.items()}
        kept.write_text(lines({name: public[name] for name in KEPT}), encoding="utf-8")
        lock.write_text(lines(public), encoding="utf-8")
        command = ["uv", "pip", "compile", "--quiet", str(HERE.parent / "pyproject.toml"), "--constraints", str(kept)]
        command += ["--python-version", OLDEST, "--python-platform", "x86_64-manylinux_2_28", "--only-binary", ":all:"]
        subprocess.run([*command, "--output-file", str(lock)], check=True, stdout=subprocess.DEVNULL)
        return pins(lock.read_text(encoding="utf-8"))


def lines(versions: dict[str, str]) -> str:
    return "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))


def main() -> None:
    if len(sys.argv) > 1:
        freeze = Path(sys.argv[1]).read_text(encoding="utf-8")
    else:
        with urllib.request.urlopen(FREEZE, timeout=60) as answer:
            freeze = answer.read().decode()
    colab = pins(freeze)
    needed = resolve(colab)
    known = {name: version for name, version in colab.items() if name in {*needed, *KEPT, REMOVED}}
    # torch from PyPI names CUDA packages that Colab's torch doesn't use.
    cuda = re.compile("(nvidia|cuda)-(?!ml-py)")
    public = {name: version.partition("+")[0] for name, version in colab.items()}
    lock = {name: version for name, version in needed.items() if public.get(name) != version and not cuda.match(name)}
    (HERE / "colab-versions.txt").write_text(VERSIONS_HEADER + lines(known), encoding="utf-8")
    (HERE / "colab-lock.txt").write_text(LOCK_HEADER + lines(lock), encoding="utf-8")


if __name__ == "__main__":
    main()
