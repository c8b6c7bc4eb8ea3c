"""Events and records → MLflow: runs, adapters as models with their genealogy, the registry, the web interface."""

from agentlab.tracking.recorder import Recorder
from agentlab.tracking.store import configure, ui_command
from agentlab.tracking.views import SuiteInfo

__all__ = ["Recorder", "SuiteInfo", "configure", "ui_command"]
