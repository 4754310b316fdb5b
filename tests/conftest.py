import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from finetune.common.progress import quiet_libraries

torch.set_num_threads(1)
quiet_libraries()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
