"""Graphics cards: memory, speed and rent, each with its source. Imports no torch.

Speeds are for dense matrix products in 16 bits with sums in 32 bits: for GeForce half of what is mostly quoted (sums in
16 bits), and without the "sparsity" that doubles both again. Rents are rough: one offer of a card by the hour, on
demand, at one of the cheaper providers. They change by the month, so pass your own.

The sources were read on 2026-11-29, none of them on the maker's or the provider's own page:

- hmc-tech: hmc-tech.com/gpu, which has the sums in 32 bits; checked against units and clock: twice the speed in
  float32 for GeForce, four times for others. A100 and H100: glennklockwood.com/garden/processors, after NVIDIA's data
  sheets. L4: grokipedia.com/page/NVIDIA_L4_vs_L40S, after the data sheet (242 with sparsity).
- computed: so, from the speed in float32 that topcpu.net gives. RTX 2060: half of the 52 that galport.com quotes.
- memory: what PyTorch said was the total in issues about memory on GitHub (RTX 2060: facebookresearch/meshrcnn 92, RTX
  3060: smy20011/dreambooth-gui 78, RTX 4060: longxiang-ai/TSGS 6, RTX 4090: ali-vilab/VGen 104), on Colab (T4), or in
  the device listing of upb-pc2.atlassian.net (A100 of 40 GB). Others weren't verified.
- RunPod: its community cloud, as transcribed in github.com/datareceipts/data-receipts (2026-11-09), the data set
  privum/ai-compute-prices (2026-08-19) and deploybase.ai (2026-03). Modal, Lambda: techbytes.app (2026-05-07).
"""

import re
from dataclasses import dataclass

from finetune.common.errors import RecipeError, given

# The share of a card's nominal gigabytes, as GiB, that programs get: the driver and error correction take the rest.
USABLE = 0.97


@dataclass(frozen=True)
class Card:
    """`memory` in GiB that programs can use, `tflops` in 16 bits, dense, `bandwidth` in GB/s, `rent` in US$ an hour.
    `sources`: of speed and bandwidth; of the rent.
    """

    name: str
    memory: float
    tflops: float
    bandwidth: float
    rent: float
    sources: tuple[str, str]
    bfloat16: bool = True


NONE = "not verified"
CARDS = {
    card.name: card
    for card in (
        Card("rtx2060-6gb", 5.8, 26, 336, 0.05, ("galport, topcpu", NONE), bfloat16=False),
        Card("rtx3070-8gb", 7.7, 41, 448, 0.08, ("computed", NONE)),
        Card("rtx4060-8gb", 7.7, 30, 272, 0.08, ("computed", NONE)),
        Card("rtx3060-12gb", 11.7, 25, 360, 0.08, ("computed", NONE)),
        Card("t4", 14.6, 65, 320, 0.59, ("hmc-tech", "Modal, 2026-05-07"), bfloat16=False),
        Card("rtx3090", 23.6, 71, 936, 0.22, ("computed", "RunPod, 2026-03")),
        Card("rtx4090", 23.6, 165, 1008, 0.34, ("waredb.com", "RunPod, 2026-03")),
        Card("l4", 22.0, 121, 300, 0.80, ("grokipedia", "Modal, 2026-05-07")),
        Card("a10", 22.0, 125, 600, 0.86, ("computed", "Lambda, 2026-05-07")),
        Card("a100-40gb", 39.4, 312, 1555, 1.00, ("glennklockwood", "RunPod, 2026-08-19")),
        Card("a100-80gb", 79.1, 312, 2039, 1.39, ("glennklockwood", "RunPod, 2026-11-09")),
        Card("h100", 79.1, 989, 3350, 2.69, ("glennklockwood", "RunPod, 2026-11-09")),
    )
}
DEFAULT = "t4"
SIZES = (6, 8, 12, 16, 24)  # GB, of the cards that most people have


def card_named(name: str) -> Card:
    """Raises RecipeError."""
    if name not in CARDS:
        raise RecipeError(f"{given('gpu', name)}: no such card in the table; there are {', '.join(CARDS)}")
    return CARDS[name]


def card_like(device: str, memory: float) -> Card | None:
    """The card that a device's own name means, the one with the nearest memory (GiB) where several do."""
    plain = device.lower().replace(" ", "")
    like = [card for card in CARDS.values() if re.search(rf"{card.name.split('-')[0]}(?!\d)", plain)]
    return min(like, key=lambda card: abs(card.memory - memory), default=None)
