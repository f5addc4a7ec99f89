"""Pictures of what is handed in, as SVG, HTML and text. Nothing here knows a text, a model or a database."""
