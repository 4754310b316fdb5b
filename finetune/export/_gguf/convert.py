"""Runs llama.cpp's `convert_hf_to_gguf.py` unchanged, also for tokenizers whose hash it doesn't know. A script:

    convert.py LLAMA_CPP PRE_TOKENIZER FOLDER [options of convert_hf_to_gguf.py]

PRE_TOKENIZER: llama.cpp's name for that of the tokenizer in FOLDER, used if its hash is unknown; '' to refuse it then.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    sources, pre_tokenizer, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    sys.path[0] = str(sources)
    sys.path.insert(1, str(sources / "gguf-py"))
    if pre_tokenizer:
        register(json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0], pre_tokenizer)
    sys.argv = ["convert_hf_to_gguf.py", *sys.argv[3:]]
    runpy.run_path(str(sources / "convert_hf_to_gguf.py"), run_name="__main__")


def register(architecture: str, pre_tokenizer: str) -> None:
    """Register a subclass of the converter's class for this architecture that falls back to `pre_tokenizer`."""
    from conversion import ModelBase, get_model_class  # type: ignore[import-not-found]

    try:
        known = get_model_class(architecture)
    except NotImplementedError:
        return  # the converter reports it

    @ModelBase.register(architecture)
    class Model(known):  # type: ignore[misc, valid-type]
        model_arch = known.model_arch

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            try:
                return str(super().get_vocab_base_pre(tokenizer))
            except NotImplementedError:
                return pre_tokenizer


if __name__ == "__main__":
    main()
