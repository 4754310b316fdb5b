"""Which modules of the package import which."""

import ast
from pathlib import Path

import finetune

PACKAGE = Path(finetune.__file__).parent


def module_name(path: Path) -> str:
    """'data.rows' of finetune/data/rows.py; a package is its folder's name, finetune itself ''."""
    return ".".join(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name: str) -> set[str]:
    """Modules of the package that a module imports, wherever the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            above, _, inside = (node.module or "").partition(".")
            if above == "finetune":
                below = {f"{inside}.{alias.name}".strip(".") for alias in node.names}
                found |= {module if module in MODULES else inside for module in below}
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] == "finetune"]
            found |= {alias.removeprefix("finetune").strip(".") for alias in names}
    return found - {name}
