"""A recipe to break, and what messages about it must mention."""

import re
from pathlib import Path

import pytest

from finetune.common.errors import RecipeError
from finetune.recipe.load import load_recipe

GOOD = """\
name: describe-products
seed: 7
model:
  llm:
    name: some/llm
    quantize: nf4
  encoders:
    image: {kind: vision, name: google/siglip}
  projectors:
    image:
      kind: mlp
      hidden: 64
adapter:
  rank: 16
  alpha: 32
data:
  - path: data/products.csv
    task: caption
    hold_out: 0.1
train:
  tokens_per_batch: 4096
  stages:
    - name: align
      trains: [projectors]
      learning_rate: 1e-3
    - name: tune
      trains: [projectors, adapter]
      learning_rate: 2.0e-4
evaluate:
  split: test
"""


def change(old: str, new: str) -> str:
    """GOOD with a text that it has once replaced."""
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


def refused(text: str | bytes | None = None, overrides=(), path: str = "x.yaml") -> str:
    """The message with which a recipe of this content is refused."""
    if text is not None:
        Path(path).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert max(map(len, message.splitlines())) < 300 + len(str(Path.cwd()))
    return message


def mentions(text: str, words: str) -> bool:
    """Whether each of 'one|two words|three' stands in the text, not inside another word."""
    return all(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) for word in words.split("|"))
