"""The torch reference of the network and its decode state."""

from ringexport.model.network import ReferenceModel
from ringexport.model.state import ReferenceState

__all__ = ["ReferenceModel", "ReferenceState"]
