"""A sample in Prometheus' text exposition format, version 0.0.4."""

from collections.abc import Iterable

from agentlab.hardware.watch import Alert, Sample

_MIB = 2**20
_KINDS = ("memory", "temperature", "swap")


def exposition(sample: Sample, alerts: Iterable[Alert] = ()) -> str:
    """Gauges in base units, each with HELP and TYPE; what the driver does not report is left out."""
    device = {"device": sample.device, "name": sample.name}
    active = {alert.kind for alert in alerts}
    metrics: list[tuple[str, str, list[tuple[dict[str, str], float | None]]]] = [
        (
            "memory_total_bytes",
            "Memory of the GPU in use or, without one, the RAM.",
            [(device, sample.total_mib * _MIB)],
        ),
        ("memory_used_bytes", "Used memory of that device.", [(device, sample.used_mib * _MIB)]),
        ("memory_idle_bytes", "Memory reserved on purpose and not in use.", [(device, sample.idle_mib * _MIB)]),
        (
            "memory_owner_bytes",
            "Memory by owner.",
            [(device | {"owner": owner}, size * _MIB) for owner, size in sorted(sample.owners.items())],
        ),
        ("memory_efficiency_ratio", "Useful over reserved memory of the known owners.", [(device, sample.efficiency)]),
        ("swap_used_bytes", "Used swap.", [({}, sample.swap_used_mib * _MIB)]),
        (
            "utilisation_ratio",
            "Share of time in which the GPU worked.",
            [(device, None if sample.utilisation_percent is None else sample.utilisation_percent / 100)],
        ),
        ("temperature_celsius", "Temperature of the GPU.", [(device, sample.temperature_c)]),
        ("power_watts", "Power that the GPU draws.", [(device, sample.power_w)]),
        ("alert_active", "1 while a limit is passed.", [({"kind": kind}, float(kind in active)) for kind in _KINDS]),
    ]
    lines = []
    for name, text, values in metrics:
        reported = [(labels, value) for labels, value in values if value is not None]
        if reported:
            lines += [f"# HELP agentlab_{name} {text}", f"# TYPE agentlab_{name} gauge"]
            lines += [f"agentlab_{name}{_labels(labels)} {value:.15g}" for labels, value in reported]
    return "\n".join(lines) + "\n"


def _labels(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
