"""How bundles are used, one file each: what a call is, or how a run goes.

single   one call at a time: its latency
offline  many clips in a call: throughput
multi    a call answers one window of each of some streams: latency of that query
stream   the runtime's own pipeline, paced as cameras are: from capture to label
"""

from __future__ import annotations

SINGLE, MULTI, OFFLINE, STREAM = SCENARIOS = ("single", "multi", "offline", "stream")
CALLED = (SINGLE, OFFLINE)  # these take --batch
STREAMED = (MULTI, STREAM)  # these take --streams
