"""The training rows as tokens, kept between runs: made anew where samples, tokenizer or layout of media changed."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from finetune.common.kept_tables import BATCH, keep, opened
from finetune.common.user_cache import user_cache
from finetune.data.kept_rows import code_hash
from finetune.data.sample_table import SampleTable
from finetune.model.features import features_key
from finetune.model.run import Run
from finetune.training.samples import SCHEMA, TokenizedSample, TokenizedSamples, tokenized

LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow")
PLACES = ("where", "media_paths", "media_begins", "media_ends")  # files may have moved
DIGEST = "sha256"


class RowsDigest:
    """SHA-256 of training rows, wherever their files are, behind those of the digest `before`."""

    def __init__(self, before: str = "") -> None:
        self._digest = hashlib.sha256(before.encode())

    def read(self, rows: Iterable[TokenizedSample]) -> Iterator[TokenizedSample]:
        """Pass rows on."""
        for row in rows:
            content = {name: value for name, value in vars(row).items() if name not in PLACES}
            self._digest.update(json.dumps(content).encode())
            yield row

    def __str__(self) -> str:
        return self._digest.hexdigest()


def tokenized_samples(samples: SampleTable, run: Run) -> tuple[TokenizedSamples, str]:
    """(samples as tokens, the digest of them all). Raises DataError with all rows that can't be used."""
    folder = _folder(samples, run)
    if (found := _kept(folder)) is not None and max(found[0].lengths) <= int(run.recipe.train.tokens_per_batch):
        return found
    digest = RowsDigest()

    def finish(writing: Path) -> bool:
        (writing / DIGEST).write_text(str(digest), encoding="utf-8")
        return True

    return TokenizedSamples(keep(folder, SCHEMA, map(vars, digest.read(tokenized(samples, run))), finish)), str(digest)


def _kept(folder: Path | None) -> tuple[TokenizedSamples, str] | None:
    try:
        table = opened(folder) if folder else None
        return (
            None
            if table is None or folder is None
            else (TokenizedSamples(table), (folder / DIGEST).read_text(encoding="utf-8"))
        )
    except OSError:  # another process replaces it
        return None


def _folder(samples: SampleTable, run: Run) -> Path | None:
    """Where the rows are kept; None for a few, or a tokenizer that can't tell what it is."""
    components, recipe = run.components, run.recipe
    backend = getattr(components.tokenizer, "backend_tokenizer", None)
    if len(samples) < BATCH or backend is None:
        return None
    content = [
        code_hash("common", "data", "model", "recipe", "training"),
        [version(name) for name in LIBRARIES],
        samples.digest(),
        hashlib.sha256(backend.to_str().encode()).hexdigest(),
        [components.tokenizer.chat_template, components.tokenizer.eos_token],
        {kind: placeholder.token for kind, placeholder in components.placeholders.items()},
        {kind: features_key(kind, encoder, recipe.media) for kind, encoder in components.encoders.items()},
        [recipe.model.model_dump(mode="json", include={"projectors", "fusion"}), recipe.media.model_dump(mode="json")],
        {name: binding.model_dump(mode="json") for name, binding in run.bindings.items()},
        [source.loss_weight for source in recipe.data],
    ]
    key = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
    return user_cache("tokens") / key[:32]
