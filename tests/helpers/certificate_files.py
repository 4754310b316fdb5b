"""The content of a certificate.json as `finetune merge` writes it."""

MEASURES = {"kl": 0.002, "agreement": 0.99, "largest_logit_difference": 0.3, "kl_from_base": 1.5}


def certificate_content(**changes) -> dict:
    return {
        "format": 1,
        "merged_into": "the dequantized nf4 LLM",
        "why": "it is closer",
        "how": "module by module, from the LLM's files",
        "reference": "the adapter over the nf4 LLM",
        "language_model": {"name": "org/llm", "revision": "c" * 40, "sha256": {}},
        "dtype": "bfloat16",
        "dtypes": {"llm": "nf4", "computed": "bfloat16", "merged": "bfloat16"},
        "rows": 64,
        "rows_held_out": 70,
        "rows_scored": 64,
        "positions": 145,
        "media": {"image": 64},
        "primary": {"mood": "f1", "words": "exact_match"},
        "saved": MEASURES,
        "candidates": {
            "the 16-bit LLM": {**MEASURES, "kl": None, "not_scored": "no memory"},
            "the dequantized nf4 LLM": {**MEASURES, "scores": {"mood": {"f1": 0.75, "accuracy": None}}},
        },
        "trained": {**MEASURES, "kl": 0.0, "agreement": 1.0, "scores": {"mood": {"f1": 0.7}}},
        "base": {**MEASURES, "kl": 2.0, "kl_from_base": 0.0},
        "base_is": "the LLM without the adapter",
        "bounds": {"min_agreement": 0.95, "max_kl": 0.1, "min_kl_from_base": None},
        "versions": {"torch": "2.13.0"},
        "sha256": {"model.safetensors": "ab" * 32},
        "adapter_sha256": {"adapter_model.safetensors": "cd" * 32},
        **changes,
    }
