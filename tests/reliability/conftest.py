"""Each promise tried for real: processes are killed, disks fill up, files are hostile. `make test` runs a share of it,
`make reliability` (RELIABILITY=full) all of it at full size, and prints a table.
"""

import os

import pytest

FULL = os.environ.get("RELIABILITY") == "full"
TABLE: list[tuple[str, str]] = []


def pytest_collection_modifyitems(config, items):
    left_out = [] if FULL else [item for item in items if item.get_closest_marker("full")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether this is the whole of it."""
    return FULL


@pytest.fixture
def tried():
    """tried(WHAT, OUTCOME): a line of the table."""
    return lambda what, outcome: TABLE.append((what, outcome))


def pytest_terminal_summary(terminalreporter):
    if FULL and TABLE:
        terminalreporter.section("reliability")
        for line in ("| tried | outcome |", "|---|---|", *(f"| {what} | {outcome} |" for what, outcome in TABLE)):
            terminalreporter.write_line(line)
