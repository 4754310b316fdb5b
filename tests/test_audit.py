"""The lock holds what pyproject.toml asks for, and the audit sees what it is there to see."""

import re
import runpy
import tomllib

import pytest
from documents import ROOT
from packaging.version import Version

AUDIT = runpy.run_path(str(ROOT / "audit" / "audit.py"))
LOCK = (ROOT / "audit" / "lock.txt").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_dependency_is_locked_with_hashes_at_a_version_that_is_allowed():
    locked = AUDIT["pins"](LOCK)
    assert len(locked) > 100 and AUDIT["unlocked"](PROJECT, locked) == []
    assert AUDIT["unlocked"](PROJECT, locked | {"jinja2": "3.1.5"}) == ["jinja2>=3.1.6: 3.1.5 in the lock"]
    for entry in re.split(r"\n(?=[a-z])", LOCK[LOCK.index("\n") :].strip()):
        assert entry.startswith("#") or re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry[:80]


@pytest.mark.parametrize("licence", ["GPL-3.0-or-later", "MIT AND GPL-2.0", "AGPL-3.0", "LGPL-2.1", "MPL-2.0", ""])
def test_a_licence_that_nobody_judged_is_seen(licence):
    assert AUDIT["judgement"]("new", licence) is None
    assert AUDIT["judgement"]("new", "BSD-3-Clause") == "permissive"


def test_the_listed_licences_are_those_of_the_lock():
    listed = re.findall(r"^\| (\S+) \| .* \| (.+) \|$", (ROOT / "audit" / "licences.md").read_text(), re.MULTILINE)
    judged = {name: fine for name, fine in listed if name in AUDIT["pins"](LOCK)}
    assert judged.keys() == AUDIT["pins"](LOCK).keys() and "**not judged**" not in judged.values()


ADVISORY = """\
id: PYSEC-2099-1
aliases: [CVE-2099-1]
affected:
- package: {ecosystem: PyPI, name: Some_Package}
  ranges:
  - {type: GIT, events: [{introduced: '0'}]}
  - {type: ECOSYSTEM, events: [{introduced: '1.2'}, {fixed: '1.4'}, {introduced: '2.0'}, {last_affected: '2.1'}]}
  versions: [0.9.post1]
"""


@pytest.mark.parametrize(
    ("version", "told"),
    [("1.1", 0), ("1.2", 1), ("1.3.9", 1), ("1.4", 0), ("2.1", 1), ("2.1.1", 0), ("0.9.post1", 1)],
)
def test_a_known_vulnerability_is_told(version, told, tmp_path, capsys):
    folder = tmp_path / "vulns" / "some-package"
    folder.mkdir(parents=True)
    (folder / "PYSEC-2099-1.yaml").write_text(ADVISORY)
    found = list(AUDIT["advisories_in"](tmp_path, {"some-package": version, "other": "1.3"}))
    assert found == [f"some-package {version}: PYSEC-2099-1 (CVE-2099-1)"] * told
    assert str(Version(version)) == version


def test_without_advisories_the_audit_fails(tmp_path):
    (said,) = AUDIT["advisories_in"](tmp_path, {"some-package": "1.3"})
    assert "give --advisories a clone of github.com/pypa/advisory-database" in said
