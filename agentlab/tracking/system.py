"""System metrics of one MLflow run while it runs: CPU, RAM, disk, network and, with NVML, the GPU."""

import threading
from typing import Any

SAMPLE_S = 1.0
SAMPLES_PER_POINT = 5  # MLflow averages them: peaks are logged by whoever measures them


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
        self._monitor.start()

    def stop(self, wait_s: float = 5.0) -> None:
        """Log what was sampled and end the thread; a store that hangs is left behind after `wait_s`."""
        if self._monitor is None:
            return
        ending = threading.Thread(target=self._monitor.finish, daemon=True, name="agentlab-system-metrics-end")
        ending.start()
        ending.join(wait_s)
        self._monitor = None
