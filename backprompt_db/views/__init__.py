"""Drawings of prompt graphs: pure functions from what is known to SVG, HTML and rich. Nothing here opens a database."""
