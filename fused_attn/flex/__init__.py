"""FlexAttention's interface: masks and changes of scores written as Python functions."""
