"""Make recipes/data/calls: what customers ask for on the telephone, in Mandarin, spoken by a speech synthesiser.

    python recipes/offline/make_calls.py [--into recipes/data/calls]

Who says what is drawn by a fixed seed; the same espeak-ng, SciPy and PyAV give the same bytes. Voices to test with
never occur in training, and every fourth pair of thing and intent is only tested.
"""

import itertools
import random
import shutil
import subprocess
import sys
import wave
from io import BytesIO
from pathlib import Path

import numpy
from dataset_files import Row, argument_parser, empty_folder, write_rows

SEED = 23
RATE = 16_000  # samples a second
BITS = 16_000  # a second, Opus
MARGIN = 0.1  # seconds of silence before and after
LANGUAGE = "cmn-latn-pinyin"  # in espeak-ng 1.51 its `cmn` looks up 的 as "de5", and reads that out in English
VOICES = {  # espeak-ng's variants; those with nearly the same settings are on one side only
    "train": (
        "m1", "m2", "m3", "m4", "m5", "m6", "f1", "f2", "f3", "f4", "f5", "Alex", "Andrea", "Annie", "Mario", "aunty",
        "belinda", "edward", "gustave", "linda", "max", "michel", "pedro", "robert",
    ),
    "test": ("m7", "Alicia", "Gene", "grandma", "iven2", "shelby", "steph", "victor"),
}  # fmt: skip
THINGS = ("耳机", "手机", "鞋子", "衣服", "水壶", "台灯", "书包", "手表")
PHRASES = {  # two for each intent
    "退货": ("要退货", "想退掉"),
    "换货": ("要换货", "想换掉"),
    "退款": ("要退款", "没退款"),
    "查件": ("没收到", "到哪了"),
    "维修": ("要维修", "坏掉了"),
    "发票": ("要发票", "没发票"),
    "取消": ("要取消", "不要了"),
    "改址": ("要改地址", "地址错了"),
}
REPLIES = {
    "退货": "好的，{}的退货已登记。",
    "换货": "好的，{}的换货已登记。",
    "退款": "好的，{}的退款正在办理。",
    "查件": "好的，{}的快递马上查询。",
    "维修": "好的，{}的维修已安排。",
    "发票": "好的，{}的发票会发给您。",
    "取消": "好的，{}的订单已取消。",
    "改址": "好的，{}的地址可以修改。",
}
OPENINGS = ("", "", "你好", "您好", "喂", "麻烦您")
READ_AS = {"地址": "di4zhi3"}  # what the synthesiser mispronounces
LINES = {"clear": None, "noise": (5, 15), "telephone": (20, 30)}  # decibels by which the speech is louder than noise
OPENINGS_PER_PHRASE = {"known": 1, "new": 3}  # to test; in training a phrase goes with each opening once


def is_new(thing: str, intent: str) -> bool:
    """Whether this pair is only tested: two things of every intent, two intents of every thing."""
    return (THINGS.index(thing) + list(PHRASES).index(intent)) % 4 == 0


def plan(split: str) -> list[Row]:
    """The rows of a table. Things, intents and phrases are spread evenly, and so are voices and lines."""
    draw = random.Random(f"{SEED}/{split}")
    sentences = []
    for intent, thing in itertools.product(PHRASES, THINGS):
        sentence = "new" if is_new(thing, intent) else "known"
        if split == "train" and sentence == "new":
            continue
        for phrase in PHRASES[intent]:
            count = len(OPENINGS) if split == "train" else OPENINGS_PER_PHRASE[sentence]
            sentences += [
                (f"{opening}我的{thing}{phrase}", intent, thing, sentence) for opening in draw.sample(OPENINGS, count)
            ]
    draw.shuffle(sentences)
    voices = itertools.cycle(itertools.product(LINES, VOICES[split]))
    return [
        {
            "audio": f"audio/{split}-{number:03}.ogg", "text": text, "intent": intent, "thing": thing,
            "reply": REPLIES[intent].format(thing), "voice": voice, "line": line, "sentence": sentence,
        }
        for number, ((text, intent, thing, sentence), (line, voice)) in enumerate(zip(sentences, voices, strict=False))
    ]  # fmt: skip


def has_synthesiser() -> bool:
    """Whether espeak-ng can be called; otherwise how to get it is printed."""
    if shutil.which("espeak-ng"):
        return True
    print("error: espeak-ng is not on PATH. Install it (Debian: apt-get install espeak-ng).", file=sys.stderr)
    return False


def speak(text: str, voice: str, draw: random.Random, language: str = LANGUAGE) -> numpy.ndarray:
    """Samples at RATE, in a pitch and speed of the day, without the silence around them."""
    from scipy.signal import resample_poly

    for word, syllables in READ_AS.items():
        text = text.replace(word, f" {syllables} ")
    manner = ["-p", str(draw.randint(30, 70)), "-s", str(draw.randint(150, 230))]
    command = ["espeak-ng", "-v", f"{language}+{voice}", *manner, "--stdout", text]
    spoken = subprocess.run(command, capture_output=True, check=True)
    with wave.open(BytesIO(spoken.stdout)) as file:
        rate = file.getframerate()
        samples = numpy.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
    return trimmed(resample_poly(samples, RATE, rate))


def trimmed(samples: numpy.ndarray) -> numpy.ndarray:
    """As loud as any other, with MARGIN seconds of silence on either side."""
    samples = 0.5 * samples / numpy.abs(samples).max()
    loud = numpy.flatnonzero(numpy.abs(samples) > 0.01)
    return numpy.pad(samples[loud[0] : loud[-1] + 1], round(MARGIN * RATE))


def send(samples: numpy.ndarray, line: str, draw: random.Random) -> numpy.ndarray:
    """What arrives: all of it, or all of it and a room's noise, or 300 to 3,400 Hz of it and a little noise."""
    from scipy.signal import butter, sosfilt

    louder = LINES[line]
    if louder is None:
        return samples
    noise = numpy.random.default_rng(draw.getrandbits(32)).standard_normal(len(samples))
    noise = sosfilt(butter(1, 1000, fs=RATE, output="sos"), noise)  # weaker towards the top
    decibels = draw.uniform(*louder)
    power = numpy.square(samples).mean() / numpy.square(noise).mean() / 10 ** (decibels / 10)
    arrived = samples + noise * power**0.5
    if line == "telephone":
        arrived = sosfilt(butter(4, (300, 3400), "bandpass", fs=RATE, output="sos"), arrived)
    return numpy.clip(arrived, -1, 1)


def write_audio(samples: numpy.ndarray, file: Path) -> None:
    """Opus in Ogg, one channel. Bitexact, so that the stream's number isn't drawn at random."""
    import av

    with av.open(str(file), "w", format="ogg", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libopus", rate=RATE, layout="mono")
        stream.bit_rate = BITS
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        whole = numpy.round(samples * 32767).astype(numpy.int16)
        frame = av.AudioFrame.from_ndarray(whole[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def main() -> int:
    chosen = argument_parser("calls", "Make the spoken requests and their tables.").parse_args()
    if not has_synthesiser():
        return 1
    empty_folder(chosen.into / "audio")
    for split in VOICES:
        rows = plan(split)
        seconds = 0.0
        for row in rows:
            draw = random.Random(f"{SEED}/{row['audio']}")
            samples = send(speak(row["text"], row["voice"], draw), row["line"], draw)
            write_audio(samples, chosen.into / row["audio"])
            seconds += len(samples) / RATE
        write_rows(chosen.into / f"{split}.csv", rows)
        print(split, len(rows), "recordings", len(VOICES[split]), "voices", round(seconds), "seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
