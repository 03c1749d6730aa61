"""Read the Params structs off the kernel headers and print them as a C string.

The C host embeds it, so that no host written in another language repeats a header.
"""

import json
import re
import sys
from pathlib import Path

_STRUCT = re.compile(r"struct (\w+Params) \{(.*?)\n\};", re.DOTALL)
_FIELD = re.compile(r"^\s*((?:const )?\w+(?:\s*\*)?)\s+(\w+);", re.MULTILINE)


def layout(text: str) -> dict[str, list[list[str]]]:
    """Return struct name -> [[field name, C type], ...] in order."""
    structs = {}
    for name, body in _STRUCT.findall(text):
        members = re.sub(r"//[^\n]*", "", body)
        fields = _FIELD.findall(members)
        if len(fields) != members.count(";"):
            sys.exit(f"{name}: a member is not of the form 'type name;'")
        structs[name] = [[field, kind.replace(" *", "*")] for kind, field in fields]
    return structs


if __name__ == "__main__":
    found: dict[str, list[list[str]]] = {}
    for path in sys.argv[1:]:
        found |= layout(Path(path).read_text(encoding="utf-8"))
    chunks = re.findall(".{1,4000}", json.dumps(found, separators=(",", ":")))
    sys.stdout.write("static const char kRingLayout[] =\n")
    sys.stdout.write("\n".join(f'    R"json({chunk})json"' for chunk in chunks) + ";\n")
