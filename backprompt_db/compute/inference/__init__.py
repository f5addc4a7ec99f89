"""Everything that touches a model: loading, identity, self-check, masks, caches, forward passes."""
