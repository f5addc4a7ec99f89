"""Bundles: representations on their way from one database to another."""
