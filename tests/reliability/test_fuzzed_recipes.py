"""Every shipped recipe, spoilt in many ways: each verb refuses it in a line that says where, at once, without torch."""

import copy
import re
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from light_process import light_process

from finetune.common.errors import RecipeError, escaped
from finetune.recipe.load import load_recipe

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "recipes"
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(RECIPES.glob("*.yaml"))}
VALUES = {name: yaml.safe_load(text) for name, text in TEXTS.items()}
VERBS = ("check", "plan", "train", "run", "sweep --over seed=1,2", "data check", "data preview", "data label")
NAMED_BY_THE_USER = {("model", "encoders"), ("model", "projectors"), ("heads",)}  # other keys there are no typos
WRONG = (
    *(
        None,
        True,
        False,
        -1,
        0,
        0.5,
        1e300,
        -1e300,
        1e-300,
        2**60,
        10**18,
        "",
        "no",
        "nan",
        ".inf",
        "2e-4",
        "\x7f",
        "a\nb",
    ),
    *(
        "../../etc/passwd",
        "é🙂\u202e",
        "x" * 5000,
        [],
        {},
        [[]],
        [None],
        {"a": 1},
        {"kind": "mlp"},
        {"kind": None},
        [{}] * 50,
    ),
)
INSERTED = (
    "&a ",
    "*a",
    "!!python/object/apply:os.system [ls]",
    "!x ",
    "<<: *a\n",
    "\t",
    "\0",
    "\x1b[2J",
    "\x85",
    "\u2028",
    "---\n",
)
INSERTED += (
    "%YAML 9.9\n",
    "{",
    "]",
    '"',
    "'",
    "? ",
    "- ",
    ": ",
    "#",
    "|",
    ">",
    "@",
    "`",
    "\\",
    "\ufeff",
    "\ud7ff",
    "🙂",
    "~",
    "[" * 60,
)
LONGEST = 6000  # characters of a message, which has at most ten problems


def places(value, location=()):
    """Locations of all keys and entries."""
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        yield (*location, step)
        yield from places(inner, (*location, step))


def at(value, location):
    for step in location:
        value = value[step]
    return value


@st.composite
def with_a_typo(draw):
    """(content, the misspelled dotted key)."""
    value = copy.deepcopy(draw(st.sampled_from(list(VALUES.values()))))
    keys = [one for one in places(value) if isinstance(one[-1], str) and one[:-1] not in NAMED_BY_THE_USER]
    *above, key = draw(st.sampled_from([one for one in keys if "columns" not in one]))
    where = draw(st.integers(0, len(key)))
    letter = draw(st.sampled_from(string.ascii_letters + "_- "))
    typo = draw(
        st.sampled_from([key[:where] + letter + key[where:], key[:where] + key[where + 1 :], key.upper(), key[::-1]])
    )
    parent = at(value, above)
    if isinstance(parent, dict) and typo not in parent:
        entries = [(typo if name == key else name, inner) for name, inner in parent.items()]
        parent.clear()
        parent.update(entries)
    return yaml.safe_dump(value, sort_keys=False).encode(), ".".join(map(str, (*above, typo)))


@st.composite
def with_a_wrong_value(draw):
    """(content, the dotted key whose value is another)."""
    value = copy.deepcopy(draw(st.sampled_from(list(VALUES.values()))))
    *above, last = draw(st.sampled_from(list(places(value))))
    wrong = draw(st.sampled_from(WRONG))
    for _ in range(draw(st.sampled_from((0, 0, 0, 3, 17, 40)))):
        wrong = [wrong]
    at(value, above)[last] = wrong
    return yaml.safe_dump(value, sort_keys=False).encode(), ".".join(map(str, (*above, last)))


@st.composite
def with_another_text(draw):
    """(content, ''): characters, lines and encodings changed."""
    text = draw(st.sampled_from(list(TEXTS.values())))
    lines = text.splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 3))):
        number = draw(st.integers(0, len(lines) - 1))
        column = draw(st.integers(0, len(lines[number])))
        line, change = lines[number], draw(st.integers(0, 5))
        lines[number] = (
            line[:column] + draw(st.sampled_from(INSERTED)) + line[column:],
            line * 2,
            " " * (column % 5) + line.lstrip(),
            line[:column],
            line[:column] + draw(st.text(max_size=5)) + line[column:],
            line.replace(": ", ":"),
        )[change]
    content = "".join(lines).encode(
        draw(st.sampled_from(["utf-8"] * 5 + ["utf-16", "gb18030", "utf-8-sig"])), "surrogatepass"
    )
    if draw(st.integers(0, 5)) == 0:
        content = content[: draw(st.integers(0, len(content)))] + draw(st.binary(max_size=3))
    return content, ""


def bombs():
    """(content, '') of what grows when it is read."""
    anchors = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    texts = (
        anchors,
        "a: " + "[" * 100_000,
        "a: " + "{b: " * 100_000,
        "? " * 100_000,
        "- " * 100_000,
        "a: " + "9" * 10**6,
    )
    texts += (
        "".join(f"k{n}: 1\n" for n in range(60_000)),
        "a: |\n" + " x\n" * 100_000,
        "".join(f"k{n}: 1\n" for n in range(5_000)),
        "#" * 2**21,
        "a: '" + "\\'" * 10**5,
    )
    return [(text.encode(), "") for text in texts]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with light_process(tmp_path_factory.mktemp("light")) as process:
        yield process.run


def is_refused(path):
    try:
        load_recipe(path)
    except RecipeError:
        return True
    return False


def assert_refused(done, key, seconds):
    message = done.stderr
    assert done.returncode == 2 and "Traceback" not in message, message[-3000:]
    assert done.stdout.split() == [], "slow modules"
    assert done.seconds < seconds, (done.seconds, message)
    assert message == escaped(message) and len(message) < LONGEST
    lines = message.splitlines()
    for line in lines:
        assert re.match(r"spoilt\.yaml:\d+: \S|spoilt\.yaml: larger than|\.\.\. and \d+ more", line), message
    named = [line.split(": ")[1] for line in lines if line.count(": ") > 1]
    about = any(one.startswith(key) or key.startswith(one) for one in named)  # the key itself, above or below it
    assert about or not key or lines[-1].startswith("... and"), (key, message)


@pytest.fixture
def tried_on(run, tmp_path, monkeypatch):
    """tried_on(CONTENT, KEY, VERB): whether it is refused; then it must be refused well."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name in ("data", "templates"):
        (folder / name).symlink_to(RECIPES / name)
    (tmp_path / "weights").symlink_to(RECIPES.parent / "weights")
    monkeypatch.chdir(folder)

    def tried_on(content, key, verb, seconds=1):
        path = folder / "spoilt.yaml"
        path.write_bytes(content)
        if not is_refused("spoilt.yaml"):
            return False
        words, _, options = verb.partition(" --")
        assert_refused(run(*words.split(), path.name, *(f"--{options}".split() if options else ())), key, seconds)
        return True

    return tried_on


EXAMPLES = (30, 2000)


def test_a_spoilt_recipe_is_refused_where_it_is_wrong(tried_on, full, tried):
    outcomes = []

    @settings(
        max_examples=EXAMPLES[full],
        derandomize=not full,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(with_a_typo(), with_a_wrong_value(), with_another_text()), st.sampled_from(VERBS))
    def spoil(spoilt, verb):
        outcomes.append(tried_on(*spoilt, verb))

    spoil()
    assert sum(outcomes) > len(outcomes) / 2
    tried(
        f"{sum(outcomes)} spoilt recipes by 8 verbs", "exit status 2, with file, line and key, no traceback, no torch"
    )


def test_a_recipe_that_grows_is_refused(tried_on, full, tried):
    texts = bombs() if full else bombs()[:3]
    for number, (content, key) in enumerate(texts):
        assert tried_on(content, key, VERBS[number % len(VERBS)], seconds=2), content[:50]
    tried(f"{len(texts)} recipes of up to a mebibyte that grow when they are read", "refused within 2 s")
