"""Folders of small models in place of those that the notebooks name: `tiny_models.py WEIGHTS INTO`."""

import shutil
import sys
from pathlib import Path

import torch
import transformers

CARD = "---\nlicense: apache-2.0\n---\n"
LLM = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
}


def main(weights: Path, into: Path) -> None:
    """Random weights; tokenizer, template and spectrogram are those of WEIGHTS."""
    shutil.copytree(weights / "minimind2-small", into / "llm", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(weights / "whisper-tiny", into / "whisper", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    llm = transformers.AutoConfig.from_pretrained(into / "llm", **LLM)
    transformers.AutoModelForCausalLM.from_config(llm).save_pretrained(into / "llm")
    whisper = transformers.AutoConfig.from_pretrained(into / "whisper", **WHISPER)
    transformers.WhisperModel(whisper).save_pretrained(into / "whisper")
    siglip = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    transformers.SiglipVisionModel(siglip).save_pretrained(into / "siglip")
    transformers.SiglipImageProcessor().save_pretrained(into / "siglip")
    for folder in into.iterdir():
        (folder / "README.md").write_text(CARD, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
