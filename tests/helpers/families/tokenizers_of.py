"""Tokenizers of the two kinds that published models have, trained in code on a few words."""

import json
from collections.abc import Mapping, Sequence
from functools import cache

from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SIZE = 512
TEXTS = (
    *("What is this? Describe the picture.", "user assistant model system USER ASSISTANT User Assistant"),
    *("red green blue yellow", "a red square", "Here is the original image and here are some crops to help you"),
    *("\n\n",) * 9,  # often enough for a token of its own, which llama.cpp wants for Idefics3
)


@cache
def _byte_level() -> str:
    """As GPT-2, Llama 3, Qwen and SmolLM have it: JSON of the tokenizer without special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return tokenizer.to_str()


@cache
def _metaspace() -> str:
    """As SentencePiece has it in Llama 2 and Gemma: ▁ for a space, runs of line breaks as tokens, else bytes."""
    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer = pre_tokenizers.Metaspace()
    draft.train_from_iterator(TEXTS * 4, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    trained = json.loads(draft.to_str())["model"]
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *trained["vocab"],
        "\n",
        "\n\n",
        "\n\n\n",
        "\n\n\n\n",
    ]
    merges = [tuple(merge) for merge in trained["merges"]] + [("\n", "\n"), ("\n\n", "\n"), ("\n\n", "\n\n")]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer.to_str()


def _specials_first(special: Sequence[str]) -> str:
    """As Mistral's Tekken has it: byte-level, the special tokens numbered from 0."""
    content = json.loads(_byte_level())
    pieces = [*special, *content["model"]["vocab"]]
    content["model"]["vocab"] = {piece: number for number, piece in enumerate(pieces)}
    return json.dumps(content)


def sentencepiece_model(tokenizer: PreTrainedTokenizerFast) -> bytes:
    """`tokenizer.model`, as it is published beside the `tokenizer.json` of a metaspace tokenizer."""
    model = ModelProto()
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.add_dummy_prefix = False
    ranks = {left + right: -rank for rank, (left, right) in reversed([*enumerate(_merges(tokenizer))])}
    for piece, number in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        known = model.pieces.add(piece=piece, score=float(ranks.get(piece, 0)))
        if number in tokenizer.added_tokens_decoder:
            known.type = known.UNKNOWN if piece == "<unk>" else known.CONTROL
        elif piece.startswith("<0x"):
            known.type = known.BYTE
    return bytes(model.SerializeToString())


def _merges(tokenizer: PreTrainedTokenizerFast) -> list[list[str]]:
    merges: list[list[str]] = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return merges


KINDS = {"byte_level": _byte_level, "metaspace": _metaspace}


def tokenizer_of(
    kind: str, special: Sequence[str], named: Mapping[str, str], begins_with: str | None = None
) -> PreTrainedTokenizerFast:
    """`named`: attribute of the tokenizer (`eos_token`, `image_token`, ...) → one of the `special` tokens.
    `begins_with`: the token that is put before every text.
    """
    text = _specials_first(special) if kind == "specials_first" else KINDS[kind]()
    tokenizer = Tokenizer.from_str(text)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if begins_with is not None:
        number = tokenizer.token_to_id(begins_with)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begins_with} $A", pair=f"{begins_with} $A $B", special_tokens=[(begins_with, number)]
        )
    assert tokenizer.get_vocab_size() <= SIZE
    usual = {key: value for key, value in named.items() if key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    more = {key: value for key, value in named.items() if key not in usual}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=more, **usual)
