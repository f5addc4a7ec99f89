"""Bundles: representations that are carried from one database to another."""
