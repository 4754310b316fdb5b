import sys

import numpy as np
import PIL.Image
import pytest
from hostile_files import encapsulated
from media_files import dicom, noise, picture

from finetune.common.errors import MediaError
from finetune.data.media import decode
from finetune.data.media.image import decode_image
from finetune.recipe.schema import Limits

RAMP = np.arange(0, 1000, 10, dtype=np.int16).reshape(10, 10)


def grey(content: bytes) -> np.ndarray:
    """The first channel, after all three were seen to be equal."""
    values = np.asarray(decode_image(content), int)
    assert values.shape[2] == 3 and (values == values[..., :1]).all()
    return values[..., 0]


def test_without_a_window_minimum_and_maximum_become_black_and_white():
    np.testing.assert_allclose(grey(dicom(RAMP)), RAMP / 990 * 255, atol=0.51)


def test_slope_and_intercept_come_before_the_window():
    content = dicom(RAMP, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=0, WindowWidth=401)
    values = RAMP * 2.0 - 1000
    expected = np.clip((values + 0.5) / 400 + 0.5, 0, 1) * 255  # PS3.3, C.11.2.1.2.1
    np.testing.assert_allclose(grey(content), expected, atol=0.51)


def test_the_first_of_several_windows_counts():
    one = dicom(RAMP, WindowCenter=300, WindowWidth=200)
    two = dicom(RAMP, WindowCenter=[300, 900], WindowWidth=[200, 10])
    np.testing.assert_array_equal(grey(one), grey(two))


def test_windows_of_the_other_functions():
    exact = dicom(RAMP, WindowCenter=500, WindowWidth=400, VOILUTFunction="LINEAR_EXACT")
    np.testing.assert_allclose(grey(exact), np.clip((RAMP - 500) / 400 + 0.5, 0, 1) * 255, atol=0.51)
    sigmoid = dicom(RAMP, WindowCenter=500, WindowWidth=400, VOILUTFunction="SIGMOID")
    np.testing.assert_allclose(grey(sigmoid), 255 / (1 + np.exp(-4 * (RAMP - 500) / 400)), atol=0.51)


def test_monochrome1_is_inverted():
    np.testing.assert_allclose(grey(dicom(RAMP, photometric="MONOCHROME1")), 255 - RAMP / 990 * 255, atol=0.51)


def test_of_several_frames_the_first_is_taken():
    frames = np.stack([RAMP, RAMP[::-1], RAMP.T])
    np.testing.assert_array_equal(grey(dicom(frames)), grey(dicom(RAMP)))


def test_one_value_all_over_is_black():
    assert not grey(dicom(np.full((4, 4), 700, np.int16))).any()


def test_colours_are_as_they_are():
    values = np.asarray(noise())
    np.testing.assert_array_equal(np.asarray(decode_image(dicom(values, photometric="RGB"))), values)
    converted = np.asarray(noise().convert("YCbCr"))
    expected = np.asarray(PIL.Image.fromarray(converted, mode="YCbCr").convert("RGB"), int)
    found = np.asarray(decode_image(dicom(converted, photometric="YBR_FULL")), int)
    np.testing.assert_allclose(found, expected, atol=2)


def test_a_palette_gives_its_colours():
    indices = np.array([[0, 1], [2, 1]], np.uint8)
    tables = {}
    for colour, table in (("Red", [0, 255, 10]), ("Green", [0, 0, 20]), ("Blue", [255, 0, 30])):
        tables[f"{colour}PaletteColorLookupTableDescriptor"] = [3, 0, 16]
        tables[f"{colour}PaletteColorLookupTableData"] = (np.array(table, np.uint16) * 257).tobytes()
    found = np.asarray(decode_image(dicom(indices, photometric="PALETTE COLOR", **tables)))
    colours = [(0, 0, 255), (255, 0, 0), (10, 20, 30)]
    np.testing.assert_array_equal(found, np.array(colours, np.uint8)[indices])


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"])
def test_both_little_endian_syntaxes(syntax):
    np.testing.assert_array_equal(grey(dicom(RAMP, syntax=syntax)), grey(dicom(RAMP)))


def test_jpeg_inside():
    header = dicom(None, Rows=48, Columns=64, SamplesPerPixel=1, BitsAllocated=8, BitsStored=8, HighBit=7)
    inside = noise().convert("L")
    found = grey(encapsulated(header, picture("JPEG", inside, quality=95), "4.50"))
    assert np.abs(found - np.asarray(inside, int)).mean() < 8


def test_an_old_file_is_known_by_its_name(tmp_path):
    (tmp_path / "scan.DCM").write_bytes(dicom(RAMP, syntax="1.2.840.10008.1.2")[132:])
    assert decode("image", tmp_path / "scan.DCM").size == (10, 10)


def test_size_is_checked_by_the_header():
    for limits, said in (
        (Limits(max_pixels=99), r"10x10 pixels; at most 99 .*`media\.max_pixels`"),
        (Limits(max_bytes=5000), r"pixels of 20,000,000 bytes; at most 5,000 .*`media\.max_bytes`"),
    ):
        with pytest.raises(MediaError, match=rf"rows\.csv:7: {said}"):
            decode("image", dicom(RAMP, NumberOfFrames=100_000), where="rows.csv:7", limits=limits)


def test_without_pydicom_its_installation_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(MediaError, match=r"rows\.csv:7: .*pip install 'finetune-kit\[dicom\]'"):
        decode("image", dicom(RAMP), where="rows.csv:7")
