"""Drop-ins for torch.nn's modules: subclasses with the same constructor and state_dict."""

from .attention import FusedMultiheadAttention

__all__ = ["FusedMultiheadAttention"]
