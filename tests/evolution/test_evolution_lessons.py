"""Which items a candidate learns from: a continuation those that its parent would get wrong. Tiny model."""

from collections import Counter

import numpy as np
import pytest
import torch
from evolution_helpers import LEARNING, evolve
from support import write_tiny_experiment

from agentlab import adapters
from agentlab.evolution import lessons
from agentlab.evolution.bench import open_bench
from agentlab.lab import Lab
from agentlab.learning import doubt, encode, sample

OVERRIDES = [*LEARNING, "population.size=3", "training.steps=12"]


@pytest.fixture(scope="module")
def grown(tiny_model, tmp_path_factory):
    """(lab, its events, a bench on it, the continuation of the second generation and the weights it began with)."""
    seen = []
    lab = Lab.open(write_tiny_experiment(tmp_path_factory.mktemp("grown"), tiny_model), OVERRIDES)
    evolve(lab, seen.append)
    genome = next(g for g in lab.run.population(2) if g.operator == "continuation")
    with open_bench(lab.run, lab.suite, seen.append, lambda: False) as bench:
        yield lab, seen, bench, genome, adapters.load(lab.run.adapter_folder(genome.parents[0]))


def test_a_continuation_looks_halfway_and_after_a_continuation_at_its_beginning(grown):
    lab, seen, *_ = grown
    looks = Counter(event.candidate for event in seen if event.kind == "focused")
    first, second = (next(g for g in lab.run.population(k) if g.operator == "continuation") for k in (1, 2))
    assert first.steps >= 2 * lessons._LEAST_STEPS > second.steps, "both kinds are looked at here"
    assert lab.run.candidate(second.parents[0]).genome.operator == "continuation"
    assert looks == {first.candidate: 1, second.candidate: 1}
    train = lab.suite.split("train")
    for event in seen:
        if event.kind == "focused":
            assert event.items <= len(train)
            assert 0 <= event.doubted <= event.items


def test_parts_are_one_training_to_whoever_looks_on(grown):
    lab, seen, *_ = grown
    for generation in (1, 2):
        for genome in lab.run.population(generation):
            steps = [event for event in seen if event.kind == "training_step" and event.candidate == genome.candidate]
            assert [event.step for event in steps] == list(range(1, genome.steps + 1))
            assert {event.steps for event in steps} == ({genome.steps} if genome.steps else set())
            training = lab.run.candidate(genome.candidate).training
            assert len(training.losses) == genome.steps
            assert not steps or steps[-1].tokens == training.train_tokens
            tokens = [event.tokens for event in steps]
            assert tokens == sorted(tokens)


def test_parts_add_up_and_draw_apart(grown):
    lab, _, _, genome, _ = grown
    for steps in (1, 15, 16, 17, 100):
        parts = lessons.parts(lab.run, genome.model_copy(update={"steps": steps}))
        assert sum(part.genome.steps for part in parts) == steps
        assert len(parts) == (1 if steps < 16 else 2)
        assert len({part.genome.seed for part in parts}) == len(parts)
    whole = genome.model_copy(update={"operator": "crossover", "steps": 100})
    assert lessons.parts(lab.run, whole) == [lessons.Part(whole, looks=False)]


def test_what_it_gets_wrong_comes_more_often(grown, monkeypatch):
    """With doubts made up: the tiny model is sure of nothing."""
    _, _, bench, genome, start = grown
    part = lessons.Part(genome.model_copy(update={"steps": 200}), looks=True)
    train = bench.suite.split("train")
    known = {item.id for item in train[::2]}
    prompts = {tuple(encode(bench.learner, bench.suite, item).input_ids) for item in train if item.id in known}
    monkeypatch.setattr(
        lessons,
        "doubts",
        lambda _e, _l, seen, _s: np.array([tuple(one.input_ids) not in prompts for one in seen]) * 1.0,
    )
    often = Counter(item.id for item in lessons.chosen(bench, part, start))
    assert often.total() == 200 * genome.batch_size
    assert sum(often[name] for name in known) < 0.25 * often.total()
    assert min(often[item.id] for item in train) > 0, "what is known is seen, too"
    assert lessons.chosen(bench, part, start) == lessons.chosen(bench, part, start)


def test_who_does_not_look_draws_evenly(grown):
    _, _, bench, genome, start = grown
    even = sample(bench.suite.split("train"), genome.steps * genome.batch_size, {}, genome.seed)
    assert lessons.chosen(bench, lessons.Part(genome, looks=False), start) == even
    assert lessons.chosen(bench, lessons.Part(genome, looks=True), None) == even


def test_without_focus_nothing_is_looked_at(tiny_model, tmp_path):
    seen = []
    lab = Lab.open(write_tiny_experiment(tmp_path, tiny_model), [*OVERRIDES, "training.focus=0"])
    evolve(lab, seen.append, [0, 1])
    assert any(event.kind == "trained" for event in seen)
    assert not any(event.kind == "focused" for event in seen)


def test_without_memory_to_look_it_learns_from_all_and_says_so(grown, monkeypatch):
    _, seen, bench, genome, start = grown

    def full(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(doubt, "_log_likelihoods", full)
    even = sample(bench.suite.split("train"), genome.steps * genome.batch_size, {}, genome.seed)
    assert lessons.chosen(bench, lessons.Part(genome, looks=True), start) == even
    assert "no memory to look" in seen[-1].message
    assert bench.learner.adapters() == []
