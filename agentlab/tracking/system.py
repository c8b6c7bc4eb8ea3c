"""System metrics of one MLflow run while it runs: CPU, RAM, disk, network, the GPU, its heat, and who holds memory."""

import threading
from typing import Any

from agentlab.hardware.watch import OWNERS, read

SAMPLE_S = 1.0
SAMPLES_PER_POINT = 1  # MLflow averages them


class _Readings:
    """One of MLflow's monitors: what its own do not read. What the driver does not report is left out."""

    def __init__(self) -> None:
        self._metrics: dict[str, list[float]] = {}

    def collect_metrics(self) -> None:
        found = read(OWNERS.holdings())
        values = {f"memory_{owner}_megabytes": size * 2**20 / 1e6 for owner, size in found.owners.items()}
        values["memory_pressure_percentage"] = 100 * found.pressure
        if found.temperature_c is not None:
            values["gpu_0_temperature_celsius"] = found.temperature_c
        for name, value in values.items():
            self._metrics.setdefault(name, []).append(value)

    def aggregate_metrics(self) -> dict[str, float]:
        return {name: round(sum(values) / len(values), 1) for name, values in self._metrics.items()}

    def clear_metrics(self) -> None:
        self._metrics.clear()


class SystemMonitor:
    """MLflow's own monitor in a daemon thread; without psutil there is none."""

    def __init__(self, run_id: str, tracking_uri: str) -> None:
        self._monitor: Any = None
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(
                run_id,
                sampling_interval=SAMPLE_S,
                samples_before_logging=SAMPLES_PER_POINT,
                resume_logging=True,
                tracking_uri=tracking_uri,
            )
        except ImportError:
            return
        self._monitor.monitors.append(_Readings())
        self._monitor.start()

    def stop(self, wait_s: float = 5.0) -> None:
        """Log what was sampled and end the thread; a store that hangs is left behind after `wait_s`."""
        if self._monitor is None:
            return
        ending = threading.Thread(target=self._monitor.finish, daemon=True, name="agentlab-system-metrics-end")
        ending.start()
        ending.join(wait_s)
        self._monitor = None
