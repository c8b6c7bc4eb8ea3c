"""A stand-in for pynvml: no GPU can be had where these tests run."""

from types import SimpleNamespace


class NotSupported(Exception):
    pass


class Nvml:
    """Two cards as NVML answers for them; what is in `silent` raises, as under WSL2."""

    NVML_TEMPERATURE_GPU = 0

    def __init__(self, silent=(), used=2**30, celsius=61, processes=None, cuda=13020):
        self.used, self.celsius, self.processes, self.cuda = used, celsius, processes or {}, cuda
        for name in silent:
            setattr(self, name, self._refuse)

    def _refuse(self, *arguments):
        raise NotSupported

    def nvmlSystemGetDriverVersion(self):
        return "580.95"

    def nvmlSystemGetCudaDriverVersion_v2(self):
        return self.cuda

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != "MIG-7c1":  # a part of the first card
            raise NotSupported
        return 0

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-{'ab'[handle]}7c1"

    def nvmlDeviceGetName(self, handle):
        return b"Card A" if handle == 0 else "Card B"

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=6 * 2**30, used=self.used, free=6 * 2**30 - self.used)

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=37, memory=10)

    def nvmlDeviceGetTemperature(self, handle, kind):
        return self.celsius

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return 8, 9

    def nvmlDeviceGetPowerUsage(self, handle):
        return 45_500

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self.processes.items()]
