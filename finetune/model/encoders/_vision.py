"""Pictures through a vision backbone: what `vision` (tiles of a picture) and `video` (frames of a clip) share, and the
pooled grids and time marks of both encoders of video. Class and register tokens and the shape of the last layer, which
differ between backbones, are measured on a blank picture, so that there is no list of families here.
"""

from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any

from finetune.common.errors import ModelError
from finetune.model.encoders._transformers import (
    LayerOptions,
    checkpoint,
    hidden_states,
    load,
    load_auto,
    probe,
    weight_of,
)

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


class BackboneOptions(LayerOptions):
    """Options of an encoder of pictures or frames."""

    name: str = checkpoint("a vision backbone (for a CLIP or SigLIP pair, its vision tower is used)")


@dataclass(frozen=True)
class Shape:
    """The sizes of a backbone's input and features, the same for every picture."""

    height: int  # pixels, as the processor scales them
    width: int  # pixels
    grid: tuple[int, int]  # patches: rows and columns
    features: int  # width of a feature
    skipped: int  # class and register tokens dropped in front of the grid
    rows: int  # features per picture: the grid, and class and register tokens if kept


def load_backbone(
    options: BackboneOptions, dtype: "torch.dtype", device: "torch.device"
) -> tuple["torch.nn.Module", Any]:
    """(module, processor) of a vision backbone, or of the vision tower of a pair. Raises ModelError."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    config = load_auto(options, AutoConfig)
    processor = load_auto(options, AutoImageProcessor)
    return load(options, AutoModel, getattr(config, "vision_config", config), dtype, device), processor


def measure(module: "torch.nn.Module", processor: Any, options: LayerOptions, keep_all: bool = False) -> Shape:
    """The sizes of a backbone, from blank pictures. `keep_all`: keep class and register tokens. Raises ModelError."""
    import PIL.Image

    pixels, wide = (
        processor(images=PIL.Image.new("RGB", size), return_tensors="pt")["pixel_values"][0]
        for size in ((64, 64), (128, 64))
    )
    if pixels.ndim != 3 or pixels.shape != wide.shape:
        raise ModelError(
            f"encoder {options.name!r}: its processor scales pictures to differing sizes; choose a backbone with one "
            "fixed size"
        )
    weight = weight_of(module)
    hidden = probe(
        options.name,
        "a vision backbone",
        module,
        pixels,
        lambda batch: hidden_states(module, options.layer, pixel_values=batch.to(weight.device, weight.dtype)),
    )
    height, width = pixels.shape[-2:]
    if hidden.ndim == 3:
        features, *grid = hidden.shape
        return Shape(height, width, (grid[0], grid[1]), features, 0, grid[0] * grid[1])
    total, features = hidden.shape
    patch = getattr(module.config, "patch_size", None)
    down, across = (height // patch, width // patch) if isinstance(patch, int) else (total, 1)
    if total < down * across or not isinstance(patch, int):
        # Backbones that merge patches (Swin) end with a smaller grid than they begin with, and have no extra tokens.
        side = isqrt(total)
        down, across = (side, side) if side * side == total else (total, 1)
    skipped = 0 if keep_all else total - down * across
    return Shape(height, width, (down, across), features, skipped, total - skipped)


def encode_pictures(module: "torch.nn.Module", pixels: "torch.Tensor", layer: int, skipped: int) -> "torch.Tensor":
    """Pixels (N, 3, height, width) -> features (N, L, W), row by row from the top left of the grid."""
    hidden = hidden_states(module, layer, pixel_values=pixels)
    rows = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
    return rows[:, skipped:]


def pool_grid(rows: "torch.Tensor", grid: tuple[int, int], side: int) -> "torch.Tensor":
    """(N, grid[0] * grid[1], W) -> (N, side * side, W): means of equal regions. Smaller grids, and all grids for `side`
    0, stay as they are.
    """
    from torch.nn.functional import adaptive_avg_pool2d

    small = pooled_grid(grid, side)
    if small == grid:
        return rows
    return adaptive_avg_pool2d(rows.transpose(1, 2).unflatten(2, grid), small).flatten(2).transpose(1, 2)


def pooled_grid(grid: tuple[int, int], side: int) -> tuple[int, int]:
    return (min(grid[0], side), min(grid[1], side)) if side else grid


def time_marks(seconds: tuple[float, ...], show: bool) -> tuple[str, ...]:
    """The text before each segment of a clip: '1.5s ', or nothing."""
    return tuple(f"{second:.1f}s " if show else "" for second in seconds)


def cut_tiles(picture: "Image", width: int, height: int, most: int, resample: int) -> list["Image"]:
    """Scale a picture to the grid of at most `most` tiles whose shape is nearest to its own, and cut it into tiles of
    width x height pixels, row by row. If there is more than one, a thumbnail of the whole picture comes first
    (InternVL 1.5, Chen et al. 2024, https://arxiv.org/abs/2404.16821, section 3.2).
    """
    columns, rows = best_grid(picture.width / picture.height, picture.width * picture.height / (width * height), most)
    whole = picture.resize((width * columns, height * rows), resample)
    tiles = [
        whole.crop((x, y, x + width, y + height))
        for y in range(0, height * rows, height)
        for x in range(0, width * columns, width)
    ]
    return tiles if len(tiles) == 1 else [picture.resize((width, height), resample), *tiles]


def best_grid(aspect: float, area: float, most: int) -> tuple[int, int]:
    """(columns, rows) of at most `most` tiles. `aspect`: width / height of the picture; `area`: its area in tiles. Of
    grids of the same shape, the finer one is used if the picture fills more than half of it.
    """
    grids = sorted(
        ((columns, rows) for columns in range(1, most + 1) for rows in range(1, most // columns + 1)),
        key=lambda grid: (grid[0] * grid[1], grid[0]),
    )
    best, difference = (1, 1), float("inf")
    for columns, rows in grids:
        distance = abs(aspect - columns / rows)
        if distance < difference or (distance == difference and area > 0.5 * columns * rows):
            best, difference = (columns, rows), distance
    return best
