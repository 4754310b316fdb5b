"""Reference log-probabilities: those of a stage's answers under the weights that it begins with, computed once."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune.common.errors import RESUME, RUN, TrainingError, option
from finetune.common.progress import bar, console
from finetune.common.user_cache import user_cache
from finetune.model.adapter import trained_tensors
from finetune.model.composite import MultimodalModel
from finetune.model.feature_store import checksum
from finetune.model.row_plan import by_segments
from finetune.training.collate import Batch, Collator, PackedRow
from finetune.training.kept_samples import RowsDigest
from finetune.training.pack import Row

NAME = "log_probs"


@dataclass(frozen=True)
class Reference:
    """`path`: the file that a resumed run reads; `origin`: identifies the LLM and the encoders in the key of the user's
    cache; '' to do without the cache.
    """

    path: Path
    origin: str
    model: MultimodalModel  # with trl's fused head
    collator: Collator

    def log_probs(self, rows: Sequence[Row], autocast: AbstractContextManager[None], resumed: bool) -> list[Tensor]:
        """For each sample in `rows`, those of its learned tokens (K,), float32. Raises TrainingError where a run is
        `resumed` and the file is gone: the weights have changed since.
        """
        sizes = self.collator.samples.learned
        if resumed:
            if (known := _read(self.path, sizes)) is None:
                raise TrainingError(
                    f"{self.path}: the reference is missing or damaged, and the weights that gave it have changed: "
                    f"{option(*RESUME)} can't go on; begin anew with {option(*RUN)}"
                )
            return known
        cached = user_cache("reference") / f"{self._key()}.safetensors" if self.origin else None
        first = PartialState().is_main_process
        known = _read(cached, sizes) if cached and first else None
        (known,) = broadcast_object_list([known])  # another run may write it while the processes are here
        if known is None:
            known = self._measured(rows, sizes, autocast)
        elif first:
            console.print("reference: as in an earlier run")
        if first:
            for path in [self.path, *([cached] if cached else [])]:
                _write(path, known)
        PartialState().wait_for_everyone()
        return known

    def _measured(
        self, rows: Sequence[Row], sizes: Sequence[int], autocast: AbstractContextManager[None]
    ) -> list[Tensor]:
        """Every process computes its share of the rows; zeros for samples that are in none."""
        model, state = self.model, PartialState()
        device = next(model.parameters()).device
        chosen = list(_first_times(rows))[state.process_index :: state.num_processes]
        own: list[tuple[int, Tensor]] = []
        model.eval()
        with torch.no_grad(), autocast, bar("reference", len(chosen)) as step:
            for row in chosen:
                batch = send_to_device(self.collator([PackedRow(groups=row, filler=False)]), device)
                log_probs = learned_log_probs(model, batch)
                numbers = [number for group in row for number in group]
                own += zip(numbers, log_probs.split([sizes[number] for number in numbers]), strict=True)
                step()
        found = dict(gather_object(own))
        return [found.get(number, torch.zeros(size)) for number, size in enumerate(sizes)]

    def _key(self) -> str:
        """A hash of what determines the reference: trained weights, LLM, rows, layout and library versions."""
        digest = hashlib.sha256(self.origin.encode())
        for name, tensor in sorted(trained_tensors(self.model).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        rows = RowsDigest()
        samples = self.collator.samples
        for _ in rows.read(samples[number] for number in range(len(samples))):
            pass
        device = next(self.model.parameters()).device.type
        content = [str(rows), self.collator.kind, device, *(version(name) for name in ("torch", "transformers"))]
        digest.update(json.dumps(content).encode())
        return digest.hexdigest()[:32]


def learned_log_probs(model: MultimodalModel, batch: Batch) -> Tensor:
    """Log-probabilities of a batch's learned tokens (K,), float32, on the CPU. `model`: with trl's fused head."""
    inputs = {key: value for key, value in batch.items() if key not in ("compared", "items", "rollout")}
    with by_segments(model.causal_lm) if "row_plan" in batch else nullcontext():
        found: Tensor = model(**inputs, use_cache=False, fused_lm_head=True).log_probs[0].float().cpu()
    return found


def _first_times(rows: Sequence[Row]) -> Iterator[Row]:
    """Of the rows of all epochs, the groups with a sample that no earlier row has."""
    seen: set[int] = set()
    for row in rows:
        new = [group for group in row if not seen.issuperset(group)]
        seen.update(number for group in new for number in group)
        if new:
            yield new


def _read(path: Path, sizes: Sequence[int]) -> list[Tensor] | None:
    """None where the file is missing, or isn't as it was written."""
    try:
        with safe_open(path, "pt") as file:
            flat, metadata = file.get_tensor(NAME), file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    whole = len(flat) == sum(sizes) and metadata.get("crc32") == str(checksum(flat))
    return list(flat.split(list(sizes))) if whole else None


def _write(path: Path, log_probs: Sequence[Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f"{path.name}.{os.getpid()}")
    flat = torch.cat(list(log_probs))
    save_file({NAME: flat}, writing, metadata={"crc32": str(checksum(flat))})
    os.replace(writing, path)
