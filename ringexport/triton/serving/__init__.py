"""The streaming model at serving time; the generated model.py imports it inside of Triton."""

from ringexport.triton.serving.model import StreamingModel

__all__ = ["StreamingModel"]
