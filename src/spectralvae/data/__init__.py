"""From scenes to a store, and from a store to batches."""
