"""Computation: from texts to missing segments, to packs, to forward passes, to results."""
