"""llama.cpp's `convert_hf_to_gguf.py`, run as it is, for tokenizers too whose hash it doesn't know. A script:

    python _gguf_convert.py LLAMA_CPP CUT FOLDER [options of convert_hf_to_gguf.py]

CUT: llama.cpp's name for how the tokenizer in FOLDER cuts text, used where the hash is unknown; '' to refuse.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    sources, cut, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    sys.path[0] = str(sources)
    sys.path.insert(1, str(sources / "gguf-py"))
    if cut:
        register(json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0], cut)
    sys.argv = ["convert_hf_to_gguf.py", *sys.argv[3:]]
    runpy.run_path(str(sources / "convert_hf_to_gguf.py"), run_name="__main__")


def register(architecture: str, cut: str) -> None:
    """In place of the converter's class for this architecture: one that knows how text is cut, if the other doesn't."""
    from conversion import ModelBase, get_model_class  # type: ignore[import-not-found]

    try:
        known = get_model_class(architecture)
    except NotImplementedError:
        return  # the converter says so itself

    @ModelBase.register(architecture)
    class Model(known):  # type: ignore[misc, valid-type]
        model_arch = known.model_arch

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            try:
                return str(super().get_vocab_base_pre(tokenizer))
            except NotImplementedError:
                return cut


if __name__ == "__main__":
    main()
