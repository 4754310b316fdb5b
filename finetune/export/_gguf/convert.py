"""Runs llama.cpp's `convert_hf_to_gguf.py` unchanged, also for tokenizers whose hash it doesn't know. A script:

    convert.py LLAMA_CPP PRE_TOKENIZER ARCHITECTURE FOLDER [options of convert_hf_to_gguf.py]

PRE_TOKENIZER: llama.cpp's name for that of the tokenizer in FOLDER, used if its hash is unknown; '' to refuse it then.
ARCHITECTURE: the class of the LLM in FOLDER, written into its config.json if the converter doesn't know the class of
the whole; '' for none.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    sources, pre_tokenizer, architecture, folder = Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
    sys.path[0] = str(sources)
    sys.path.insert(1, str(sources / "gguf-py"))
    sys.argv = ["convert_hf_to_gguf.py", *sys.argv[4:]]
    if "--mmproj" not in sys.argv:
        prepare(folder / "config.json", pre_tokenizer, architecture)
    runpy.run_path(str(sources / "convert_hf_to_gguf.py"), run_name="__main__")


def prepare(file: Path, pre_tokenizer: str, architecture: str) -> None:
    """Name the LLM's class where the converter needs it, and register a subclass of the converter's class for it that
    falls back to `pre_tokenizer`.
    """
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class  # type: ignore[import-not-found]

    config = json.loads(file.read_text(encoding="utf-8"))
    if architecture and not is_known(get_model_architecture(config, ModelType.TEXT)):
        config["text_config"]["architectures"] = [architecture]
        file.write_text(json.dumps(config), encoding="utf-8")
    name = get_model_architecture(config, ModelType.TEXT)
    if not is_known(name):
        return  # the converter reports it
    known = get_model_class(name)
    if getattr(known, "supports_mtp_export", False):
        sys.argv.append("--no-mtp")  # transformers doesn't load these layers, so they aren't in the folder
    if not pre_tokenizer:
        return

    @ModelBase.register(name)
    class Model(known):  # type: ignore[misc, valid-type]
        model_arch = known.model_arch

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            try:
                return str(super().get_vocab_base_pre(tokenizer))
            except NotImplementedError:
                return pre_tokenizer


def is_known(architecture: str) -> bool:
    """Whether the converter writes LLMs of this class."""
    from conversion import get_model_class

    try:
        get_model_class(architecture)
    except (NotImplementedError, KeyError):
        return False
    return True


if __name__ == "__main__":
    main()
