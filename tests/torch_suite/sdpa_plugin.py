"""pytest plugin: torch's SDPA is ours, before a test file is imported."""

import torch.nn.functional as F

from fused_attn import scaled_dot_product_attention

F.scaled_dot_product_attention = scaled_dot_product_attention
