"""A large encoder beside a small LLM, three epochs: ViT-L/14 at 224 pixels, 256 tokens a picture, random weights."""

from benchmarks.train_vs_trl.workload import Workload
from benchmarks.train_vs_trl.workloads.captions import rows

VIT_L = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
WORKLOAD = Workload(rows, pictures=12, tokens_per_batch=1120, vision=VIT_L)
