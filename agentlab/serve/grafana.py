"""A Grafana dashboard of what `/metrics` has; the data source is chosen when it is imported."""

from typing import Any

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
# (title, unit, [(query, legend)], a line at this value); panels fill rows of two
_PANELS: list[tuple[str, str, list[tuple[str, str]], float | None]] = [
    (
        "Time to the whole answer", "s",
        [(f"histogram_quantile({q}, sum by (le) (rate(agentlab_request_seconds_bucket[$__rate_interval])))", f"p{p}")
         for q, p in ((0.5, 50), (0.95, 95))],
        2.0,
    ),
    (
        "Time to the first piece, and in the queue", "s",
        [("histogram_quantile(0.95, sum by (le) (rate(agentlab_first_token_seconds_bucket[$__rate_interval])))",
          "first piece p95"),
         ("histogram_quantile(0.95, sum by (le) (rate(agentlab_queue_wait_seconds_bucket[$__rate_interval])))",
          "queue p95")],
        None,
    ),
    (
        "Share of answers within 2 s", "percentunit",
        [('sum(rate(agentlab_request_seconds_bucket{le="2.0"}[$__rate_interval])) / '
          "sum(rate(agentlab_request_seconds_count[$__rate_interval]))", "within the target")],
        None,
    ),
    (
        "Requests", "short",
        [("agentlab_requests_in_flight", "in flight"), ("agentlab_requests_queued", "queued")], None,
    ),
    (
        "Responses", "reqps",
        [("sum by (path, code) (rate(agentlab_http_responses_total[$__rate_interval]))", "{{path}} {{code}}")], None,
    ),
    (
        "Answers and failures", "reqps",
        [("sum by (state) (rate(agentlab_answers_total[$__rate_interval]))", "{{state}}"),
         ("sum by (reason) (rate(agentlab_failures_total[$__rate_interval]))", "no answer: {{reason}}")],
        None,
    ),
    (
        "Tokens", "short",
        [("sum by (kind) (rate(agentlab_tokens_total[$__rate_interval]))", "{{kind}} per second")], None,
    ),
    (
        "Champion", "short",
        [("agentlab_champion_info", "{{adapter}} of {{run}}"), ("agentlab_champion_swaps_total", "taken over"),
         ("agentlab_champion_swap_failures_total", "could not be loaded")],
        None,
    ),
    (
        "Memory", "bytes",
        [('agentlab_memory_bytes{kind="used"}', "{{device}} used"),
         ('agentlab_memory_bytes{kind="total"}', "{{device}} total"),
         ("agentlab_process_memory_bytes", "server")],
        None,
    ),
    (
        "Memory of the device by owner", "bytes",
        [("agentlab_memory_owner_bytes", "{{owner}}"), ("agentlab_memory_idle_bytes", "reserved, idle"),
         ("agentlab_memory_used_bytes", "used"), ("agentlab_memory_total_bytes", "total"),
         ("agentlab_swap_used_bytes", "swap")],
        None,
    ),
    (
        "Use of what is reserved, load of the GPU", "percentunit",
        [("agentlab_memory_efficiency_ratio", "useful share"), ("agentlab_utilisation_ratio", "GPU load")],
        None,
    ),
    (
        "Heat and power of the GPU", "short",
        [("agentlab_temperature_celsius", "°C"), ("agentlab_power_watts", "W")],
        None,
    ),
    (
        "Limits that are passed", "short",
        [("agentlab_alert_active", "{{kind}}")],
        None,
    ),
]  # fmt: skip


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    variable = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "hide": 0}
    return {
        "uid": "agentlab-serve",
        "title": "agentlab serve",
        "tags": ["agentlab"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [variable]},
        "annotations": {"list": []},
        "panels": [_panel(at, *panel) for at, panel in enumerate(_PANELS)],
    }


def _panel(at: int, title: str, unit: str, queries: list[tuple[str, str]], line: float | None) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if line is not None:
        steps.append({"color": "red", "value": line})
    return {
        "id": at + 1,
        "type": "timeseries",
        "title": title,
        "datasource": _SOURCE,
        "gridPos": {"h": 8, "w": 12, "x": 12 * (at % 2), "y": 8 * (at // 2)},
        "fieldConfig": {
            "defaults": {
                "unit": unit,
                "min": 0,
                "thresholds": {"mode": "absolute", "steps": steps},
                "custom": {"thresholdsStyle": {"mode": "line" if line is not None else "off"}},
            },
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + n), "datasource": _SOURCE, "expr": query, "legendFormat": legend}
            for n, (query, legend) in enumerate(queries)
        ],
    }
