"""The topics under which `vmoe-run --help` sets its options."""

from __future__ import annotations

TOPICS = {
    "Sources": (
        "camera", "source", "list", "replay", "sampling", "duration", "loop", "fps", "raw",
        "reconnect", "read_timeout", "rtsp_transport", "seed",
    ),
    "Engine": ("backend", "server", "device", "threads", "cache", "trust"),
    "Windows": ("hop", "buffer", "max_staleness", "latency_budget", "max_batch"),
    "Labels and events": ("top", "smooth", "threshold", "hysteresis", "min_event"),
    "Outputs": (
        "show", "save", "jsonl", "events", "csv", "as_json", "mqtt", "webhook", "page", "metrics",
        "stats_every", "overwrite",
    ),
    "Guard": (
        "guard", "guard_profile", "on_alarm", "vote_share", "guard_calibrate", "guard_filter",
        "false_alarms",
    ),
}  # fmt: skip
