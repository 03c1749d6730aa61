"""Write what is derived from the code: reference pages of docs/ and the plugins' contract header.

`make docs` runs this, tests compare.
"""

from pathlib import Path

from ringexport.cli.reference import render_reference as render_cli
from ringexport.ops.plugin_header import render_plugin_header
from ringexport.ops.reference import render_reference as render_ops

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {"cli.md": render_cli, "ops.md": render_ops}
HEADER = ROOT / "plugins" / "hosts" / "tensorrt" / "op_contract.h"

if __name__ == "__main__":
    for name, render in PAGES.items():
        (DOCS / name).write_text(render(), encoding="utf-8")
    HEADER.write_text(render_plugin_header(), encoding="utf-8")
