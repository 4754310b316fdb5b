"""Folders of small models in place of those that the notebooks name: `tiny_models.py WEIGHTS INTO`."""

import shutil
import sys
from pathlib import Path

import torch
import transformers

CARD = "---\nlicense: apache-2.0\n---\n"


def main(weights: Path, into: Path) -> None:
    shutil.copytree(weights / "minimind2-small", into / "llm")
    shutil.copytree(weights / "whisper-tiny", into / "whisper")
    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    transformers.SiglipVisionModel(config).save_pretrained(into / "siglip")
    transformers.SiglipImageProcessor().save_pretrained(into / "siglip")
    for folder in into.iterdir():
        (folder / "README.md").write_text(CARD, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
