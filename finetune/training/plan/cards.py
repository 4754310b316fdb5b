"""Graphics cards: memory, speed and rent. Imports no torch.

Speeds are the makers' own for dense matrix products in 16 bits with sums in 32 bits, where they name them: for GeForce
that is half of what is mostly quoted, and without the "sparsity" that doubles it again. They are from NVIDIA's data
sheets of T4, L4, A10, A100 and H100 and its white papers on the Turing, Ampere GA102 and Ada architectures, or for
smaller cards of these computed from their units and clock. Rents are rough: what a card cost by the hour, on demand, at
the cheaper providers in 2025. They change by the month, so pass your own.
"""

from dataclasses import dataclass

from finetune.common.errors import RecipeError

GIB = 2**30
# The share of a card's nominal gigabytes, as GiB, that programs get: the driver and error correction take the rest.
USABLE = 0.97


@dataclass(frozen=True)
class Card:
    """`memory` in GiB that programs can use, `tflops` in 16 bits, dense, `bandwidth` in GB/s, `rent` in US$ an hour."""

    name: str
    memory: float
    tflops: float
    bandwidth: float
    rent: float
    bfloat16: bool = True


CARDS = {
    card.name: card
    for card in (
        Card("rtx2060-6gb", 5.8, 26, 336, 0.05, bfloat16=False),
        Card("rtx3070-8gb", 7.8, 41, 448, 0.08),
        Card("rtx4060-8gb", 7.8, 30, 272, 0.08),
        Card("rtx3060-12gb", 11.6, 25, 360, 0.08),
        Card("t4", 14.6, 65, 320, 0.35, bfloat16=False),
        Card("rtx3090", 23.6, 71, 936, 0.22),
        Card("rtx4090", 23.6, 165, 1008, 0.35),
        Card("l4", 22.0, 121, 300, 0.70),
        Card("a10", 22.0, 125, 600, 0.75),
        Card("a100-40gb", 39.4, 312, 1555, 1.30),
        Card("a100-80gb", 79.1, 312, 2039, 1.80),
        Card("h100", 79.1, 989, 3350, 3.00),
    )
}
DEFAULT = "t4"
SIZES = (6, 8, 12, 16, 24)  # GB, of the cards that most people have


def card_named(name: str) -> Card:
    """Raises RecipeError."""
    if name not in CARDS:
        raise RecipeError(f"--gpu {name}: no such card in the table; there are {', '.join(CARDS)}")
    return CARDS[name]
