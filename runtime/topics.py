"""The topics under which `vmoe-run --help` and `vmoe-bench --help` set their options."""

from __future__ import annotations

RUN = {
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

BENCH = {
    "What is measured": (
        "baseline", "scenario", "batch", "streams", "threads", "force_route", "cuda_graph",
        "include_transfers", "seed",
    ),
    "How long": ("warmup", "duration", "iterations", "percentile"),
    "Engine": ("backend", "server", "device"),
    "Beside the speed": ("accuracy", "accuracy_clips", "robust", "power"),
    "Report": ("out", "csv", "md", "plot", "as_json", "overwrite", "compare", "fail_over"),
}  # fmt: skip
