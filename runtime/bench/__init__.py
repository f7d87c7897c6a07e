"""vmoe-bench: what a bundle costs, route by route, and whether it really runs sparse.

settings     the flags
run          one run: load, measure, judge, record
subjects     loaded bundles, and the clips that they are measured on
scenarios    how bundles are used, one file each: single, multi, offline, stream
forms        the calls that are compared: free, each forced route, each part alone, all experts
measuring    calls every form once a round, in an order that is drawn anew each round
statistics   percentiles and ratios, with an interval that needs no assumption
device       where a call's time goes on a GPU
beside       what stands beside the times, of the same engines, after them:
accuracy       clean clips, and adversarial ones as they were saved
energy         joules of a clip, in blocks, by a meter of power
certificate  the sparsity certificate
verdicts     what the numbers say, and what they cannot say
context      where and with what it was measured
watch        the machine meanwhile, by what sensors tells
about        what the bundles are
record       all of it, and as JSON (schema.json)
render       the record as text, CSV and Markdown
plots        the record as pictures
compare      two records: which rows became slower, beyond noise
"""
