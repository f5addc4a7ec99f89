"""What a prompt is: texts, their segments and ids, and what a run of one returns."""
