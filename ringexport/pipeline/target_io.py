"""What goes in and out of a target's graph, for the manifest."""

from ringexport.bundle import TargetIO
from ringexport.checkpoint import RingConfig

__all__ = ["target_io"]


def target_io(config: RingConfig) -> TargetIO:
    """Return the tensors of a model: the same for every target."""
    cache = ("B", config.num_key_value_heads, "S", config.head_dim)
    return TargetIO(
        linear_layers=config.linear_layers,
        softmax_layers=config.softmax_layers,
        shapes={
            "past_state": ("B", config.num_attention_heads, config.head_dim, config.head_dim),
            "past_key": cache,
            "past_value": cache,
            "logits": ("B", "L", config.vocab_size),
        },
    )
