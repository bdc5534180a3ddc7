"""Lines of code of the package, file by file: what `make size` prints.

Docstrings, comments and blank lines do not count: to explain costs nothing.
"""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "hbp"
BUDGETS = {"core": 1900, "": 5970}
FILE_BUDGET = 500
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(path: Path) -> int:
    """How many lines of a file hold code."""
    text = path.read_text("utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    spans = [(t.start[0], t.end[0]) for t in tokens if t.type not in NO_CODE]
    lines = {line for first, last in spans for line in range(first, last + 1)}
    for node in ast.walk(ast.parse(text)):
        # A string that stands alone is a docstring, or the description of a constant.
        alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if alone and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(lines)


def sizes(folder: Path = PACKAGE) -> dict[str, int]:
    """Lines of code of every file, by its path in the folder."""
    files = sorted(folder.rglob("*.py"))
    return {path.relative_to(folder).as_posix(): code_lines(path) for path in files}


def main() -> None:
    """Print a line per file, and the sums beside their budgets."""
    found = sizes()
    for name, count in found.items():
        print(f"{count:6,}  {name}")
    for folder, budget in BUDGETS.items():
        total = sum(n for name, n in found.items() if name.startswith(folder))
        print(f"{total:6,}  of {budget:,} in hbp{'.' + folder if folder else ''}")


if __name__ == "__main__":
    main()
