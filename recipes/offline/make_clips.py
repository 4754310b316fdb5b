"""Make recipes/data/clips: two-second videos in which one emoji picture follows another, with questions on the order.

    python recipes/offline/make_clips.py [--data recipes/data] [--into recipes/data/clips]

Which picture appears where is drawn by a fixed seed; the same PyAV gives the same bytes. Clips to train on show
pictures of the emoji's train.csv only, clips to test on those of its test.csv only.
"""

import itertools
import random
from fractions import Fraction
from pathlib import Path

import numpy
from dataset_files import Row, argument_parser, empty_folder, read_rows, shuffled_cycles, write_rows
from PIL import Image

SEED = 21
SIDE = 128  # pixels
FRAMES = 8
RATE = 4  # frames a second
QUALITY = "30"  # x264's constant rate factor
CLIPS_PER_PAIR = {"train": 4, "test": 1}  # of labels, first and second told apart: 72 pairs
QUESTIONS = {"先出现的是什么？": "first", "后出现的是什么？": "second"}


def plan(pictures: list[Row], clips_per_pair: int, prefix: str) -> list[Row]:
    """One row per clip: its file, the two pictures and their labels. Every ordered pair of labels occurs equally often,
    and no picture a second time before all of its label have been shown."""
    draw = random.Random(f"{SEED}/{prefix}")
    images = shuffled_cycles(pictures, "label", "image", draw)
    pairs = list(itertools.permutations(images, 2)) * clips_per_pair
    draw.shuffle(pairs)
    return [
        {
            "video": f"videos/{prefix}-{number:03}.mp4",
            "first": next(images[first]), "first_label": first,
            "second": next(images[second]), "second_label": second,
        }
        for number, (first, second) in enumerate(pairs)
    ]  # fmt: skip


def questions(clips: list[Row]) -> list[Row]:
    """Two rows per clip, one for each question."""
    return [
        {
            "video": clip["video"], "question": question, "answer": clip[f"{which}_label"],
            "label": clip[f"{which}_label"], "first": clip["first"], "second": clip["second"],
        }
        for clip in clips
        for question, which in QUESTIONS.items()
    ]  # fmt: skip


def frames(first: Image.Image, second: Image.Image, draw: random.Random) -> list[numpy.ndarray]:
    """FRAMES pictures of (SIDE, SIDE, 3): each half moves and zooms its own picture over white."""
    made = []
    for picture in (first, second):
        sizes = draw.sample((0.78, 0.96), 2)  # grows or shrinks
        ways = [(draw.uniform(0, 1), draw.uniform(0, 1)) for _ in sizes]  # where in the room that is left, 0 to 1
        for step in numpy.linspace(0, 1, FRAMES // 2):
            side = round(SIDE * (sizes[0] + (sizes[1] - sizes[0]) * step))
            place = [round((SIDE - side) * (a + (b - a) * step)) for a, b in zip(*ways, strict=True)]
            frame = Image.new("RGB", (SIDE, SIDE), "white")
            frame.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (place[0], place[1]))
            made.append(numpy.asarray(frame))
    return made


def write_video(pictures: list[numpy.ndarray], file: Path) -> None:
    """H.264 in MP4. One thread and bitexact, so that the file doesn't depend on the machine."""
    import av

    with av.open(str(file), "w", options={"fflags": "+bitexact"}) as container:
        options = {"crf": QUALITY, "preset": "veryslow", "threads": "1"}
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        stream.codec_context.time_base = Fraction(1, RATE)
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    chosen = argument_parser("clips", "Make the clips of emoji pictures and their tables.", reads="emoji/").parse_args()
    emoji = chosen.data / "emoji"
    empty_folder(chosen.into / "videos")
    for split, clips_per_pair in CLIPS_PER_PAIR.items():
        clips = plan(read_rows(emoji / f"{split}.csv"), clips_per_pair, split)
        for clip in clips:
            pair = [Image.open(emoji / clip[which]).convert("RGB") for which in ("first", "second")]
            moved = frames(pair[0], pair[1], random.Random(f"{SEED}/{clip['video']}"))
            write_video(moved, chosen.into / clip["video"])
        rows = questions(clips)
        write_rows(chosen.into / f"{split}.csv", rows)
        print(split, len(clips), "clips", len(rows), "rows")


if __name__ == "__main__":
    main()
