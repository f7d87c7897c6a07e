"""Attacks, one file each: `Settings`, `attack(twin, clip, label, settings)`."""
