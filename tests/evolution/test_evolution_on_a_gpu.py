"""A run on a GPU: `make gpu`."""

import pytest
from gpu import ON_A_GPU
from support import write_tiny_model

from agentlab.inference import vllm_build
from agentlab.lab import Lab

pytestmark = ON_A_GPU
needs_vllm = pytest.mark.skipif(vllm_build.build() != "cuda", reason="vLLM is not here for CUDA")


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=needs_vllm)])
def test_generations_run_on_the_gpu_and_say_what_they_took(tmp_path, tiny_experiment, engine):
    """With vLLM the two take turns on the card, within one budget."""
    model = write_tiny_model(tmp_path / "model", 256, 4)  # vLLM's kernels know no heads of 8
    wanted = [f"model.engine={engine}", f"model.primary={model}", "budget.vram_gib=3", "budget.context_gib=0.6"]
    lab = Lab.open(tiny_experiment, ["population.generations=2", "mutation.max_rank=8", *wanted])
    for generation in range(2):
        assert list(lab.generation(generation))
    assert lab.run.rung() == "bf16"
    candidates = lab.run.candidates()
    assert len(candidates) >= 6
    for candidate in candidates:
        assert candidate.score.engine == engine
        assert 0 < candidate.score.vram_peak_mib <= 3 * 1024
