"""Scenes to latents, and latents to scenes."""
