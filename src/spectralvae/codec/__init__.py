"""Scenes to small files: what is lost is known or bounded, and every byte is counted."""
