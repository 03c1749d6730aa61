"""The name of the form of the decay; without numpy, so that help can list the names quickly."""

from enum import StrEnum

__all__ = ["DecayIndex"]


class DecayIndex(StrEnum):
    """Which layer index the decay uses. Public implementations disagree; none is a safe default.

    With l the 0-based layer and L the number of layers:

    * ``serving``: 1 - l/(L-1) + 1e-5. Every engine that the authors ship for serving and
      training (their SGLang wheel, SGLang and vLLM main, FLOOD, AReaL).
    * ``hf``: 1 - (l-1)/(L-1) + 1e-5. The published Hugging Face model code.
    * ``clamped``: 1 - max(0, l-1)/max(1, L-1) + 1e-5. mlx-lm and mlxcel.
    """

    SERVING = "serving"
    HF = "hf"
    CLAMPED = "clamped"
