"""Everything that touches a model: loading, identity, self-check, masks, keys and values, forward passes."""
