"""Stores: parts as bytes under addresses."""
