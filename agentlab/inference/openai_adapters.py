"""Adapters on a vLLM server that was started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1."""

import functools
import os
import shutil
import tempfile
from pathlib import Path

from agentlab import adapters as adapter_room
from agentlab.errors import AdapterError
from agentlab.inference.contract import EngineError
from agentlab.inference.openai_server import Server, Unavailable


class ServerAdapters:
    """The adapters that this process has loaded on a server; the server reads their folders, so it must see them.

    Each load has a name of its own on the server, which keeps what it knows under an old one.
    """

    def __init__(self, server: Server, possible: bool) -> None:
        self._server = server
        self._possible = possible
        self._names: dict[str, str] = {}
        self._numbers = 0
        self._scratch = Path(tempfile.mkdtemp(prefix="agentlab-served-"))

    @functools.cached_property
    def possible(self) -> bool:
        """Whether the server loads adapters at run time."""
        if not self._possible:
            return False
        try:
            self._server.post("/v1/unload_lora_adapter", {"lora_name": f"agentlab-none-{os.getpid()}"})
        except Unavailable:
            raise  # it is asked again the next time
        except EngineError as error:
            return "cannot be found" in str(error)  # the adapter, not the address
        return True

    def load(self, adapter: str, folder: Path) -> None:
        """Raises AdapterError for what is damaged, hostile, or refused by the server."""
        lora = adapter_room.load(folder)
        if not self.possible:
            raise AdapterError(
                f"the server at {self._server.base_url} loads no adapters; allowed: vLLM, started with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"
            )
        self._numbers += 1
        name = f"{adapter}-{os.getpid()}-{self._numbers}"
        copy = self._scratch / name
        adapter_room.save(lora, copy)  # the server reads what was checked
        try:
            self._server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(copy)})
        except EngineError as error:
            shutil.rmtree(copy, ignore_errors=True)
            if isinstance(error, Unavailable):
                raise
            # vLLM fails (500) at what does not fit its model
            raise AdapterError(f"adapter {adapter} cannot be loaded: {error}") from None
        self.unload(adapter)
        self._names[adapter] = name

    def unload(self, adapter: str) -> None:
        """Free it on the server; unknown ids are ignored."""
        name = self._names.pop(adapter, None)
        if name is not None:
            self._server.post("/v1/unload_lora_adapter", {"lora_name": name})
            shutil.rmtree(self._scratch / name, ignore_errors=True)

    def ids(self) -> list[str]:
        """Loaded ids, sorted."""
        return sorted(self._names)

    def name(self, adapter: str) -> str:
        """What the adapter is called on the server. Raises AdapterError for one that is not loaded."""
        if adapter not in self._names:
            raise AdapterError(f"adapter {adapter} is not loaded; loaded: {', '.join(self.ids()) or 'none'}")
        return self._names[adapter]

    def close(self) -> None:
        """Unload all; a server that is gone has nothing to unload."""
        for adapter in self.ids():
            try:
                self.unload(adapter)
            except EngineError:
                self._names.pop(adapter, None)
        shutil.rmtree(self._scratch, ignore_errors=True)


class ServedAdapters:
    """The adapters' part of an engine whose model is on a server."""

    _adapters: ServerAdapters

    def load_adapter(self, adapter: str, folder: Path) -> None:
        self._adapters.load(adapter, folder)

    def unload_adapter(self, adapter: str) -> None:
        self._adapters.unload(adapter)

    def adapters(self) -> list[str]:
        return self._adapters.ids()
