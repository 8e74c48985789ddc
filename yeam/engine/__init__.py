"""Carrying a plan out: tiles in, bytes out at their planned places, resumable, and one rename at the end."""
