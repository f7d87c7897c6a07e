"""Attacks, one file each, each the `--attack` of its name.

A file holds `Settings`, `attack(twin, clip, label, settings, indices=None) -> AttackResult`, and
`PART`, what it attacks, which fixes its criterion of success: `model` (the label is wrong),
`router` (the route has changed) or `expert` (the expert of `settings.expert` is wrong).
"""
