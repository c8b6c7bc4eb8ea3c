import time


def test_x(tiny_experiment):
    from agentlab.lab import Lab
    from agentlab.evolution.generation import run_generation

    lab = Lab.open(tiny_experiment)
    ev = []
    for k in range(3):
        t = time.time()
        r = run_generation(lab.run, lab.suite, k, ev.append)
        print(time.time() - t, r)
    for e in ev:
        print(e.to_json()[:200])
    for c in lab.run.candidates():
        print(
            c.genome,
            c.state,
            c.score and (c.score.accuracy, c.score.fitness, c.score.latency_estimated_s, c.score.answers),
            c.training.losses,
            c.training.train_seconds,
        )
    print((lab.run.folder / "rates.json").read_text())
    print(lab.run.score("base", "fitness"))
    assert 0
