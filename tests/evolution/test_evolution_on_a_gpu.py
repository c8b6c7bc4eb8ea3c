"""A run on a GPU: `make gpu`."""

from gpu import ON_A_GPU

from agentlab.lab import Lab

pytestmark = ON_A_GPU


def test_generations_run_on_the_gpu_and_say_what_they_took(tiny_experiment):
    lab = Lab.open(tiny_experiment, ["population.generations=2", "model.engine=transformers"])
    for generation in range(2):
        assert list(lab.generation(generation))
    assert lab.run.rung() == "bf16"
    candidates = lab.run.candidates()
    assert len(candidates) >= 6
    for candidate in candidates:
        assert candidate.score.vram_peak_mib > 0
