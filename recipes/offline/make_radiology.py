"""Make recipes/data/radiology: drawn phantoms of a chest with a line of a record, a finding and a sentence of report.

    python recipes/offline/make_radiology.py [--into recipes/data/radiology]

Nothing here comes from a patient or a scanner: the pictures are ellipses, blobs and noise, the records are drawn by
chance, and the rule that joins them to a finding is a toy. Not for diagnosis. Everything depends on a fixed seed; the
same NumPy, Pillow and pydicom give the same bytes.
"""

import random
from pathlib import Path

import numpy
from dataset_files import Row, argument_parser, empty_folder, write_picture, write_rows
from PIL import Image

SEED = 33
SIDE = 128  # pixels
ROWS = {"train": 320, "test": 120}  # a fourth of each finding
DICOM_ROWS = 20  # of those to test with: DICOM files, in a table of their own
SIDES = {"right": "右", "left": "左"}  # of the patient: the right lung stands on the left of the picture
FINDINGS = {"normal": "正常", "infection": "感染", "mass": "肿块", "fluid": "积液"}
REPORTS = {
    "zh": {
        "normal": "双肺清晰，未见异常。", "infection": "{}肺阴影，考虑感染。", "mass": "{}肺阴影，考虑肿块。",
        "fluid": "{}侧胸腔积液。",
    },
    "en": {
        "normal": "Both lungs are clear.", "infection": "{} lung opacity, likely infection.",
        "mass": "{} lung opacity, likely mass.", "fluid": "{} pleural fluid.",
    },
}  # fmt: skip
SEXES = {"zh": ("男", "女"), "en": ("man", "woman")}
RECORDS = {  # by language and whether there is fever: age, sex, and what is drawn from `amount`
    ("zh", True): (
        "{1}，{0}岁，发热{2:.1f}度，咳嗽",
        "{1}，{0}岁，高热{2:.1f}度，寒战",
        "{1}，{0}岁，体温{2:.1f}，咳痰",
    ),
    ("zh", False): ("{1}，{0}岁，不发热，吸烟{2}年", "{1}，{0}岁，体温正常，烟龄{2}年", "{1}，{0}岁，消瘦，吸烟{2}年"),
    ("en", True): ("{1}, {0}, fever {2:.1f}, cough", "{1}, {0}, fever {2:.1f}, chills"),
    ("en", False): ("{1}, {0}, no fever, smoked {2} years", "{1}, {0}, weight loss, smoked {2} years"),
}
ENGLISH = 0.35  # share of rows
AGAINST = 0.05  # share of infections and masses whose record says the opposite


def plan() -> dict[str, list[Row]]:
    """The rows of each table. Fever tells the two kinds of opacity apart; among the other scans it means nothing."""
    written: set[str] = set()
    tables = {}
    for split, count in ROWS.items():
        draw = random.Random(f"{SEED}/{split}")
        rows = []
        for number in range(count):
            finding, side = list(FINDINGS)[number % len(FINDINGS)], draw.choice(list(SIDES))
            language = "en" if draw.random() < ENGLISH else "zh"
            fever = draw.random() < {"infection": 1 - AGAINST, "mass": AGAINST}.get(finding, 0.5)
            where = SIDES[side] if language == "zh" else side.capitalize()
            rows.append({
                "record": record(language, fever, written, draw), "finding": FINDINGS[finding], "finding_en": finding,
                "report": REPORTS[language][finding].format(where), "side": "none" if finding == "normal" else side,
                "language": language,
            })  # fmt: skip
        draw.shuffle(rows)
        tables[split] = [{"image": f"images/{split}-{number:03}.png"} | row for number, row in enumerate(rows)]
    in_dicom = [row | {"image": row["image"].replace(".png", ".dcm")} for row in tables["test"][:DICOM_ROWS]]
    return tables | {"test": tables["test"][DICOM_ROWS:], "test-dicom": in_dicom}


def record(language: str, fever: bool, written: set[str], draw: random.Random) -> str:
    """A line of a record that no other row has."""
    while True:
        amount = round(draw.uniform(38, 40.5), 1) if fever else draw.randint(5, 45)
        line = draw.choice(RECORDS[language, fever]).format(draw.randint(20, 88), draw.choice(SEXES[language]), amount)
        if line not in written:
            written.add(line)
            return line


def draw_scan(finding: str, side: str, chance: numpy.random.Generator) -> numpy.ndarray:
    """A phantom of SIDE x SIDE grey values from 0 (air) to 1: body, two lungs, ribs, heart, finding, blur and noise."""
    from scipy.ndimage import gaussian_filter

    y, x = numpy.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    x, y = x + chance.uniform(-0.06, 0.06), y + chance.uniform(-0.06, 0.06)
    size = chance.uniform(0.88, 1.06)

    def ellipse(across: float, down: float, width: float, height: float) -> numpy.ndarray:
        return ((x / size - across) / width) ** 2 + ((y / size - down) / height) ** 2

    scan = 0.75 * (ellipse(0, 0, 0.95, 1.1) < 1)
    lungs = {name: ellipse(across, -0.05, 0.3, 0.62) < 1 for name, across in (("right", -0.42), ("left", 0.42))}
    for lung in lungs.values():
        scan[lung] = 0.18
    for down in numpy.arange(-0.6, 0.6, 0.17):
        ribs = (numpy.abs(y / size - down - 0.12 * numpy.abs(x / size)) < 0.025) & (lungs["right"] | lungs["left"])
        scan[ribs] += chance.uniform(0.06, 0.14)
    scan[ellipse(0.12, 0.3, 0.3, 0.3) < 1] = 0.7
    middle = -0.42 if side == "right" else 0.42
    if finding in ("infection", "mass"):
        place = middle + chance.uniform(-0.1, 0.1), chance.uniform(-0.4, 0.25)
        blob = numpy.exp(-ellipse(*place, *chance.uniform(0.12, 0.19, 2)))
        scan += chance.uniform(0.4, 0.55) * blob * lungs[side]
    elif finding == "fluid":
        level = chance.uniform(0.05, 0.3)
        curve = level + 0.25 * numpy.abs(x / size - middle) * numpy.where(numpy.abs(x / size) > 0.42, -1, 1)
        scan[lungs[side] & (y / size > curve)] = chance.uniform(0.62, 0.75)
    scan = gaussian_filter(scan, chance.uniform(0.8, 1.6)) + chance.normal(0, chance.uniform(0.015, 0.035), scan.shape)
    return numpy.clip(chance.uniform(0.85, 1.1) * scan + chance.uniform(-0.05, 0.05), 0, 1)


def scan_of(row: Row) -> numpy.ndarray:
    chance = numpy.random.default_rng(list(f"{SEED}/{row['image']}".encode()))
    return draw_scan(row["finding_en"], row["side"], chance)


def write_dicom(scan: numpy.ndarray, file: Path) -> None:
    """A secondary capture of 12 bits, RLE lossless, that says in its header that it is a phantom."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, RLELossless, SecondaryCaptureImageStorage, generate_uid

    uid = generate_uid(entropy_srcs=[str(SEED), file.name])
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SecondaryCaptureImageStorage, uid
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(file), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.Modality = SecondaryCaptureImageStorage, uid, "OT"
    dataset.PatientName, dataset.PatientID = "PHANTOM^SYNTHETIC", file.stem
    dataset.ImageComments = "Drawn by a program; no patient, not for diagnosis"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = *scan.shape, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
    dataset.PixelData = numpy.round(scan * 4095).astype("<u2").tobytes()
    dataset.compress(RLELossless, generate_instance_uid=False)
    dataset.save_as(file, enforce_file_format=True)


def main() -> None:
    chosen = argument_parser("radiology", "Make the phantoms and their tables.").parse_args()
    empty_folder(chosen.into / "images")
    for name, rows in plan().items():
        for row in rows:
            scan, file = scan_of(row), chosen.into / row["image"]
            if file.suffix == ".dcm":
                write_dicom(scan, file)
            else:
                grey = numpy.round(scan * 15) * 17  # 16 steps of grey: small files
                write_picture(Image.fromarray(grey.astype(numpy.uint8)), file, colours=16)
        write_rows(chosen.into / f"{name}.csv", rows)
        print(name, len(rows), "rows")


if __name__ == "__main__":
    main()
