"""What the stores hold, as SQL metadata: derived from the store, never needed for a hit, rebuilt when lost."""
