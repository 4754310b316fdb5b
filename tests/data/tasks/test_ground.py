import PIL.Image
import pytest
from task_rows import Asked

from finetune.common.errors import DataError
from finetune.data.media.image import decode_image, image_size
from finetune.data.sample import Answer


def test_pixels_become_thousandths_of_the_picture(tmp_path):
    asked = Asked("ground", tmp_path)  # of 32 x 24 pixels
    for boxes in ("[8, 6, 16, 24]", [8, 6, 16, 24], "8,6 16,24", "[[8, 6, 16, 24.0]]"):
        sample = asked.sample(phrase="红杯子", boxes=boxes)
        assert sample.answer == "[250, 250, 500, 1000]"
        assert sample.target == [{"label": "", "box": [250, 250, 500, 1000]}]
    assert sample.question[0].content[1].startswith("红杯子\n")
    cocos = Asked("ground", tmp_path, order="corner_and_size").sample(phrase="x", boxes=[8, 6, 8, 18])
    assert cocos.answer == sample.answer
    shares = Asked("ground", tmp_path, units="fractions").sample(phrase="x", boxes=[0.25, 0.25, 0.5, 1.0])
    assert shares.answer == sample.answer
    for text in (".25 .25 .5 1", "2.5e-1, 0.25, 0.5, 1.", "[0.25, 25e-2, .5, 1]"):
        assert Asked("ground", tmp_path, units="fractions").sample(phrase="x", boxes=text).answer == shares.answer
    tiny = asked.sample(phrase="x", boxes=[[31.99, 0, 32, 0.001]]).target[0]["box"]
    assert tiny == [999, 0, 1000, 1]


def test_several_boxes_with_labels_stand_on_lines(tmp_path):
    asked = Asked("ground", tmp_path, text="", labels="names")
    sample = asked.sample(boxes=[[0, 0, 16, 12], [16, 12, 32, 24]], names="猫; dog")
    assert sample.answer == "猫 [0, 0, 500, 500]\ndog [500, 500, 1000, 1000]"
    assert asked.read(sample.answer) == sample.target
    assert asked.scores((sample, "dog: [500, 500, 1000, 1000]\n猫：[0,0,500,500]"))["iou"] == 1.0
    swapped = asked.scores((sample, "dog [0, 0, 500, 500]\n猫 [500, 500, 1000, 1000]"))
    assert swapped == {"iou": 0.0, "accuracy@0.5": 0.0, "f1@0.5": 0.0}
    nothing = asked.sample(boxes=[])
    assert nothing.answer == "[]" and asked.scores((nothing, "[]"), (nothing, "none"))["iou"] == 0.5
    with pytest.raises(DataError, match=r"rows\.csv:2: 2 boxes in column 'boxes', 1 labels"):
        asked.sample(boxes=[[0, 0, 16, 12], [16, 12, 32, 24]], names="cat")


def test_answers_are_read_however_they_are_put(tmp_path):
    asked = Asked("ground", tmp_path)
    boxes = lambda text: [found["box"] for found in asked.read(text) or []]  # noqa: E731
    assert boxes("It is at [10, 20,30 , 40.4].") == [[10, 20, 30, 40]]
    assert boxes("[[1, 2, 3, 4], [5,6,7,8]]") == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert boxes("[-5, 0, 2000, 10]") == [[0, 0, 1000, 10]] and boxes("[1，2，3，4]") == [[1, 2, 3, 4]]
    assert [asked.read(text) for text in ("", "no", "[1, 2, 3]", "[a, b, c, d]", "[" * 2000)] == [None] * 5
    assert asked.read(" [] ") == []


@pytest.mark.parametrize(
    "boxes, reason",
    [
        *[("", "boxes"), (None, "boxes"), ("cat", "boxes"), ([1, 2, 3], "boxes"), ([[1, 2, "a", 4]], "boxes")],
        *[([0, 0, 40, 10], "leaves the picture"), ([0, -3, 4, 10], "leaves"), ([9, 9, 3, 3], "has no area")],
        *[([4, 4, 4, 9], "has no area"), ([[float("nan"), 0, 3, 3]], "leaves")],
    ],
)
def test_boxes_that_cannot_be_are_refused(tmp_path, boxes, reason):
    with pytest.raises(DataError, match=rf"rows\.csv:2: .*{reason}"):
        Asked("ground", tmp_path).sample(phrase="x", boxes=boxes)


def test_a_picture_turned_by_its_exif_is_measured_upright(tmp_path):
    picture, exif = PIL.Image.new("RGB", (40, 20)), PIL.Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        picture.save(tmp_path / "turned.jpg", exif=exif)
        assert image_size(tmp_path / "turned.jpg") == decode_image(tmp_path / "turned.jpg").size
    asked = Asked("ground", tmp_path)
    assert asked.sample(image="turned.jpg", phrase="x", boxes=[10, 20, 20, 40]).answer == "[500, 500, 1000, 1000]"


def test_a_broken_picture_is_named(tmp_path):
    asked = Asked("ground", tmp_path)
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"rows\.csv:2: not a picture"):
        asked.sample(image="b.png", phrase="x", boxes=[1, 1, 2, 2])
    with pytest.raises(DataError, match=r"rows\.csv:2: 2 pictures"):
        asked.sample(image=["a.png", "a.png"], phrase="x", boxes=[1, 1, 2, 2])


def test_good_is_the_overlap(tmp_path):
    asked = Asked("ground", tmp_path)
    sample = asked.sample(phrase="x", boxes=[0, 0, 32, 24])
    assert asked.row(sample, Answer("[0, 0, 1000, 500]"))["good"] == 0.5
    assert asked.row(sample, Answer("nowhere"))["good"] == 0.0
