"""Tensors without data, and a count of the bytes that are alive.

`Meter` counts storages of tensors, real or not. `Rehearsal` runs code on tensors that have shapes but no data, and
counts theirs. What depends on values still works: whole numbers and truth values that come from other such (token ids,
positions, masks) are computed for real, and a number that is asked of a tensor without data is 1.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# Their result has nothing of their argument but its shape.
OF_A_SHAPE = {aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones, aten.new_full}
# What autocast computes in float32 on a GPU but not on a CPU, of the operations that decoders use.
FLOAT32_ON_GPU = {torch.nn.functional.layer_norm, torch.nn.functional.softmax, torch.nn.functional.group_norm}


class Meter(TorchDispatchMode):
    """`live`: bytes of the storages alive that an operation has returned within this context; `peak`: the most there
    were since `reset`; `flops`: multiplications and additions of matrix products, convolutions and attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = self.calls = 0
        self._seen: Any = weakref.WeakKeyDictionary()

    def reset(self) -> None:
        self.peak, self.flops, self.calls = self.live, 0, 0

    def note(self, tensor: Any) -> None:
        """Count a tensor's storage, once."""
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = self.run(func, args, kwargs)
        self.calls += 1
        for tensor in tree_leaves(result):
            self.note(tensor)
        self.flops += _flops(func, args, kwargs, result)
        return result

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    if func.overloadpacket in flop_registry:
        return int(flop_registry[func.overloadpacket](*args, **kwargs, out_val=result))
    if func.name().startswith("bitsandbytes::gemm_4bit"):  # (..., K) by packed weights -> (..., N)
        return 2 * int(args[0].numel()) * int(result.shape[-1])
    return 0


class Rehearsal(Meter):
    """Tensors that are made in this context have no data, but for whole numbers and truth values."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self.fake)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if tensors:
                return _for_real(func, args, kwargs)
            made = func(*args, **kwargs)
            return _for_real(func, args, kwargs) if _is_whole(made) else made
        if func is aten._local_scalar_dense.default:
            return _kind(args[0].dtype)(1)
        if func.overloadpacket is aten.index:
            args = (args[0], [place for index in args[1] for place in _places(index)])
        result = func(*args, **kwargs)
        if func.overloadpacket in OF_A_SHAPE and _is_whole(result):
            return _for_real(func, *tree_map_only(FakeTensor, _with_data, (args, kwargs)))
        return result


@contextmanager
def with_data() -> Iterator[None]:
    """Tensors that are made in this context have data, and aren't counted, though a rehearsal is going on."""
    with _disable_current_modes():
        yield


def _for_real(func: Any, args: Any, kwargs: Any) -> Any:
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def _is_whole(result: Any) -> bool:
    """Whether it is a tensor of whole numbers or truth values."""
    return isinstance(result, Tensor) and not result.is_floating_point() and not result.is_complex()


def _kind(dtype: torch.dtype) -> type:
    if dtype == torch.bool:
        return bool
    return float if dtype.is_floating_point else int


def _with_data(tensor: Tensor) -> Tensor:
    with unset_fake_temporarily():
        return torch.empty(tensor.shape, dtype=tensor.dtype)


def _places(index: Tensor | None) -> Sequence[Tensor | None]:
    """A mask whose values are known, as the positions that it selects: without them, their number isn't known."""
    if index is None or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return [index]
    with unset_fake_temporarily():
        return index.nonzero().unbind(1)


@contextmanager
def gpu_autocasts() -> Iterator[None]:
    """PEFT asks whether a GPU autocasts: in the forward pass, and where activation checkpoints repeat it."""
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


class AutocastOnGpu(TorchFunctionMode):
    """Autocast to `dtype`, as on a GPU, for tensors that are on the CPU: what the CPU's own autocast leaves in half
    precision, and a GPU's computes in float32, is cast here.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.autocast = torch.autocast("cpu", dtype=dtype)

    def __enter__(self) -> Self:
        self.autocast.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.autocast.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FLOAT32_ON_GPU and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _to_float32, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _to_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
