"""Graph passes, one file each; which run over what, in which order, is said in export/optimize.py.

A file of this folder holds `apply(graph) -> bool`: it changes the graph in place, and says
whether it changed anything.
"""
