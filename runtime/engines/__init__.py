"""Backends, one file each: `why_unavailable()` and `open(settings)`."""
