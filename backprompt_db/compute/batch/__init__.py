"""Many texts at once: planning a run and running it."""
