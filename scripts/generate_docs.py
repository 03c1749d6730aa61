"""Write the reference pages of docs/ from the code; `make docs` runs this, tests compare."""

from pathlib import Path

from ringexport.cli.reference import render_reference

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {"cli.md": render_reference}

if __name__ == "__main__":
    for name, render in PAGES.items():
        (DOCS / name).write_text(render(), encoding="utf-8")
