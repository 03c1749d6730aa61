"""Triton Inference Server: writes a model repository, and answers its requests (`serving`)."""

from ringexport.triton.options import TritonOptions
from ringexport.triton.repository import WrittenRepository, write_repository

__all__ = ["TritonOptions", "WrittenRepository", "write_repository"]
