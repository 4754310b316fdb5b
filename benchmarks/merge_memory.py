"""Peak memory of merging an LLM module by module, beside the size of its files: python benchmarks/merge_memory.py

LLMs of more and more layers, random weights in bfloat16 in files of 20 MB, and LoRA on all their linear layers,
merged into files as large, from the 16-bit weights and from weights that went through nf4. Each merge in a process of
its own; what Python and the libraries take is left out, by merging a tiny LLM first.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path


def make(folder: Path, layers: int, width: int, shard: int) -> None:
    """An LLM folder, and an adapter for it that changes every linear layer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "llm", max_shard_size=shard)
    wrapped = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    wrapped.save_pretrained(folder / "adapter", save_embedding_layers=False)


def merge(folder: Path, quantize: bool, shard: int) -> None:
    import torch
    from transformers import BitsAndBytesConfig

    from finetune.merging.lora_weights import LoraFile, Quantization, blocks, load_on_disk, merged_tensors
    from finetune.merging.merged_folder import Shards
    from finetune.recipe.schema import Llm

    llm = load_on_disk(Llm(name=str(folder / "llm")), torch.bfloat16, folder / "scratch")
    quantization = None
    if quantize:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        quantization = Quantization(config, frozenset(name for name in blocks(llm) if "_proj" in name))
    (folder / "merged").mkdir()
    shards = Shards(folder / "merged", shard)
    for name, tensor in merged_tensors(llm, torch.bfloat16, LoraFile(folder / "adapter"), quantization):
        shards.add(name, tensor)
    shards.close()


def measured(folder: Path, quantize: bool, shard: int) -> dict[str, float]:
    """Megabytes of the merged files, and of memory that the merge adds."""

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6

    merge(folder / "tiny", quantize, shard)
    before = peak()
    merge(folder / "large", quantize, shard)
    files = sum(path.stat().st_size for path in (folder / "large" / "merged").glob("*.safetensors")) / 1e6
    return {"files": files, "added": peak() - before}


def measure(layers: int, width: int, quantize: bool, shard: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        for step in (["--make", str(layers)], ["--merge", *(["--nf4"] if quantize else [])]):
            command = [sys.executable, __file__, "--folder", folder, "--width", str(width)]
            command += ["--shard", str(shard), *step]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--merge", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--nf4", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--width", type=int, default=512, help="Width of the LLM.")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48], help="Layers of each LLM.")
    parser.add_argument("--shard", type=int, default=20, help="Megabytes of a file, read and written.")
    given = parser.parse_args()
    shard = given.shard * 10**6
    if given.make:
        make(given.folder / "tiny", 1, 64, shard)
        make(given.folder / "large", given.make, given.width, shard)
    elif given.merge:
        print(json.dumps(measured(given.folder, given.nf4, shard)))
    else:
        print("layers  files, MB  the merge adds, MB: 16-bit   nf4")
        for layers in given.layers:
            plain, quantized = (measure(layers, given.width, quantize, given.shard) for quantize in (False, True))
            print(f"{layers:6}  {plain['files']:9.0f}  {plain['added']:26.0f}  {quantized['added']:4.0f}", flush=True)


if __name__ == "__main__":
    main()
