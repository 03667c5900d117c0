"""Code that imports `flash_attn` runs without it: on a laptop, in CI, on any GPU.

    from fused_attn.integrations import flash_attn

    flash_attn.install()
    from flash_attn import flash_attn_func   # ours, with flash_attn's arguments and semantics

`install()` provides the modules `flash_attn`, `flash_attn.flash_attn_interface`,
`flash_attn.bert_padding` and `flash_attn.layers.rotary`, where no real flash_attn is installed.
"""

from .installing import install, is_installed, uninstall

__all__ = ["install", "is_installed", "uninstall"]
