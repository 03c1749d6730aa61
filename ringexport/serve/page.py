"""The chat page: one file, which may load and send nothing but to this server."""

import base64
import hashlib
import importlib.resources
import re

from starlette.responses import Response

__all__ = ["page_response"]

FILE = "page.html"


def page_response() -> Response:
    """Return the page with headers that forbid everything that it does not need."""
    data = importlib.resources.files("ringexport.serve").joinpath(FILE).read_bytes()
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hashes(data, 'script')}",
            f"style-src {_hashes(data, 'style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
    return Response(
        data,
        media_type="text/html",
        headers={
            "Content-Security-Policy": policy,
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        },
    )


def _hashes(page: bytes, tag: str) -> str:
    """Return the sources of the inline parts of a kind, as a content security policy has them."""
    found = re.findall(rb"<%b>(.*?)</%b>" % (tag.encode(), tag.encode()), page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(part).digest()).decode() for part in found]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
