"""Write the reference pages of docs/ from the code; `make docs` runs this, tests compare."""

from pathlib import Path

from ringexport.cli.reference import render_reference as render_cli
from ringexport.ops.reference import render_reference as render_ops

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {"cli.md": render_cli, "ops.md": render_ops}

if __name__ == "__main__":
    for name, render in PAGES.items():
        (DOCS / name).write_text(render(), encoding="utf-8")
