"""Many texts at once: what a run will take, and running it."""
