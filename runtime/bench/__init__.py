"""vmoe-bench."""
