"""vmoe-bench: what a bundle costs, route by route, and whether it really runs sparse.

subjects     loaded bundles, and the clips that they are measured on
forms        the calls that are compared: free, each forced route, each part alone, all experts
measuring    calls every form once a round, in an order that is drawn anew each round
statistics   percentiles and ratios, with an interval that needs no assumption
certificate  the sparsity certificate
verdicts     what the numbers say, and what they cannot say
record       all of it as JSON (schema.json), text, CSV and Markdown
"""
