"""Models on disk: checkpoints, exports and foreign files, with their settings, normalisation and provenance."""
