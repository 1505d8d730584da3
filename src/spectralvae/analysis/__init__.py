"""How good a reconstruction is, and against what."""
