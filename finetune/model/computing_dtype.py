"""The dtype that a run computes in where its recipe says `auto`: the device's usual one, unless a second's measurement
finds another much faster.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from statistics import median
from time import perf_counter, process_time

import finetune.model.eager_bitsandbytes  # noqa: F401

import torch
from bitsandbytes.functional import QuantState, get_4bit_type
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from torch.nn import functional

from finetune.common.progress import console
from finetune.model.language_model import read_config, resolve_dtype
from finetune.recipe.schema import LanguageModel, Quantize

SECONDS = 1.0  # that a measurement may take, from its second round on
ROUNDS = 7
TOKENS = 128
NARROWEST = 256  # of the LLMs that are measured: in narrower ones calls take longer than products
WIDEST = 1024  # of the layer that is measured
INNER = 3  # times the width, between the two products of a feed-forward block
RANK = 16
# How many times as fast a layer must be: attention, head, projectors and optimizer gain less than it (LOG, 2026-11-29),
# and runs of one machine shouldn't differ by chance.
CLEARLY = 3.0
Step = Callable[[], None]


def measured_dtype(llm: LanguageModel, device: torch.device) -> str:
    """`llm.dtype`, or in the place of `auto` the dtype to train in: still 'auto' where it is the device's usual one.
    What was measured is printed, once in a process. Raises ModelError where the LLM's config can't be read.
    """
    if llm.dtype != "auto" or llm.quantize == "int8":  # which computes in 8 bits
        return llm.dtype
    width = min(read_config(llm).get_text_config().hidden_size, WIDEST)
    return _faster(width, llm.quantize, device) if width >= NARROWEST else "auto"


@cache
def _faster(width: int, quantize: Quantize, device: torch.device) -> str:
    usual = resolve_dtype("auto", device)
    other = (
        torch.bfloat16 if usual == torch.float32 else torch.float32
    )  # no float16 on a CPU, which has no loss scaling
    times = times_as_fast(width, quantize, device, usual, other)
    names = [str(dtype).removeprefix("torch.") for dtype in (usual, other)]
    taken = times >= CLEARLY
    where = "this GPU" if device.type == "cuda" else "this CPU"
    console.print(
        f"dtype: {names[taken]}; a layer of the LLM is {times:.1f} times as fast in {names[1]} as in {names[0]} on "
        f"{where}, and auto takes {names[1]} from {CLEARLY:g} times on"
    )
    return names[1] if taken else "auto"


def times_as_fast(
    width: int, quantize: Quantize, device: torch.device, usual: torch.dtype, other: torch.dtype
) -> float:
    """How many times as fast a layer is in another dtype as in the usual one."""
    first, second = (FeedForward(width, quantize, dtype, device).step for dtype in (usual, other))
    # On a CPU processor time, so that what else runs on the machine counts as little as can be.
    clock = perf_counter if device.type == "cuda" else process_time
    with _one_thread():
        return median(one / another for one, another in rounds(first, second, clock))


def rounds(first: Step, second: Step, clock: Callable[[], float]) -> Iterator[tuple[float, float]]:
    """Seconds of both steps, one after the other, ROUNDS times or until SECONDS are over; a first round warms up."""
    begin = clock()
    for number in range(ROUNDS + 1):
        before = clock()
        first()
        between = clock()
        second()
        after = clock()
        if number:
            yield between - before, after - between
        if number and after - begin > SECONDS:
            return


@contextmanager
def _one_thread() -> Iterator[None]:
    """Several would spend the processor's time waiting for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class FeedForward(nn.Module):
    """A feed-forward block as training runs it: frozen weights of `dtype`, or in nf4, LoRA in float32 beside them.
    Its weights are the same for all dtypes, and no random numbers of the process are used.
    """

    def __init__(self, width: int, quantize: Quantize, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.dtype, self.device = dtype, device
        self.random = torch.Generator().manual_seed(0)
        shapes = {"gate": (INNER * width, width), "up": (INNER * width, width), "down": (width, INNER * width)}
        make = self._in_nf4 if quantize == "nf4" else self._plain
        self.frozen = nn.ModuleDict({name: make(*shape) for name, shape in shapes.items()})
        self.lora = nn.ParameterDict(
            {
                f"{name}_{side}": nn.Parameter(self._values(*pair))
                for name, (rows, columns) in shapes.items()
                for side, pair in (("a", (RANK, columns)), ("b", (rows, RANK)))
            }
        )
        self.norm = nn.RMSNorm(width, device=device, dtype=dtype)
        self.inputs = nn.Parameter(self._values(TOKENS, width).to(dtype))

    def _values(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=self.random).mul_(columns**-0.5).to(self.device)

    def _plain(self, rows: int, columns: int) -> nn.Module:
        layer = nn.Linear(columns, rows, bias=False, device="meta")
        layer.weight = nn.Parameter(self._values(rows, columns).to(self.dtype), requires_grad=False)
        return layer

    def _in_nf4(self, rows: int, columns: int) -> nn.Module:
        """Of random bytes: quantizing takes longer on a CPU than the whole measurement may."""
        packed = torch.randint(0, 256, (rows * columns // 2, 1), dtype=torch.uint8, generator=self.random)
        scales = torch.full((rows * columns // 64,), columns**-0.5, device=self.device)
        shape, code = torch.Size([rows, columns]), get_4bit_type("nf4", device=self.device)
        state = QuantState(scales, shape, code, blocksize=64, quant_type="nf4", dtype=self.dtype)
        layer = Linear4bit(columns, rows, bias=False, compute_dtype=self.dtype, quant_type="nf4", device="meta")
        layer.weight = Params4bit(
            packed.to(self.device), quant_state=state, bnb_quantized=True, quant_type="nf4", module=layer
        )
        return layer

    def _product(self, name: str, rows: Tensor) -> Tensor:
        added = functional.linear(functional.linear(rows.float(), self.lora[f"{name}_a"]), self.lora[f"{name}_b"])
        result: Tensor = self.frozen[name](rows) + added.to(rows.dtype)
        return result

    def forward(self) -> Tensor:
        """(TOKENS, width)."""
        rows = self.norm(self.inputs)
        return self.inputs + self._product(
            "down", functional.silu(self._product("gate", rows)) * self._product("up", rows)
        )

    def step(self) -> None:
        """Forward and backward, under autocast on a GPU, as training does."""
        on_gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, self.dtype, enabled=on_gpu and self.dtype != torch.float32):
            result = self()
        result.float().sum().backward()
        self.zero_grad()
        if on_gpu:
            torch.cuda.synchronize(self.device)
