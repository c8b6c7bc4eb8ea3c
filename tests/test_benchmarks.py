"""Every benchmark runs at its smallest size and ends in the JSON line its readers expect. No times are judged."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from agentlab import models

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(script, *options):
    """The JSON line that the benchmark ends with."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *map(str, options)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_crossover():
    result = run("crossover.py", "--out", 64, "--in", 96, "--rank", 4, "--repeats", 1, "--dense")
    assert result["benchmark"] == "crossover"
    assert {"target_s", "met"} <= result.keys()
    assert [(layer["out"], layer["in"]) for layer in result["layers"]] == [(16, 24), (64, 96)]
    assert all(layer["exact_s"] > 0 and layer["relative_difference"] < 1e-4 for layer in result["layers"])


def test_population(tiny_model):
    size = ("--adapters", 2, "--rank", 4, "--batch", 4, "--tokens", 3, "--repeats", 1)
    result = run("population.py", "--model", tiny_model, *size)
    assert result["benchmark"] == "population"
    assert set(result["ways"]) == {"base", "adapters", "reload"}
    assert all(way["tokens_per_s"] > 0 and way["seconds"] > 0 for way in result["ways"].values())
    assert result["speed_met"] == (result["speed_ratio"] >= result["speed_bar"])
    assert result["switch_cost_met"] == (result["switch_cost_ratio"] >= result["switch_cost_bar"])
    assert result["whole_time_ratio"] > 0


@pytest.mark.soak
@pytest.mark.model
def test_engines():
    result = run("engines.py", "--adapters", 2, "--rank", 4, "--items", 2, "--tokens", 6, "--slots", 1)
    assert result["benchmark"] == "engines"
    assert set(result["engines"]) == {"transformers", "vllm"}
    assert result["answers"] == 6
    assert result["same_met"] == (result["same_share"] >= result["same_bar"])
    assert result["models_told_apart"] > 1


def test_training_agrees_with_bare_trl(tiny_model):
    result = run("training.py", "--model", tiny_model, "--steps", 2, "--batch-size", 2, "--repeats", 1, "--same-loss")
    assert result["benchmark"] == "training"
    assert set(result["ways"]) == {"ours", "bare", "same loss"}
    assert result["met"] == (result["ratio"] <= result["bar"])
    assert result["same_loss_ratio"] > 0
    losses = [way["final_loss"] for way in result["ways"].values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)
    assert result["final_loss_difference"] == abs(losses[0] - losses[1])


@pytest.mark.notebook
@pytest.mark.timeout(300)
def test_equal_cost(tiny_experiment):
    learning = ("population.size=4", "training.steps=12", "lora.dropout=0.0")  # enough for somebody to pass the gate
    options = [word for override in learning for word in ("--set", override)]
    suite = tiny_experiment.parent.parent / "suite"
    result = run("equal_cost.py", "--experiment", tiny_experiment, "--suite", suite, *options)
    (row,) = result["seeds"]
    assert row["items"] == 20
    assert row["gain"][0] == pytest.approx(row["champion"] - row["base"])
    assert row["over_sft"][0] == pytest.approx(row["champion"] - row["sft"])
    assert row["sft_train_tokens"] == pytest.approx(row["train_tokens"], rel=0.1)
    assert result["not_below_sft"] == (row["over_sft"][2] >= 0)


def test_memory():
    size = ("--size", 400, "--queries", 10, "--writes", 5)
    result = run("memory.py", "--vectors", "random", *size)
    assert result["benchmark"] == "memory"
    assert set(result["random"]) == {"flat faiss", "memory"}
    ours = result["random"]["memory"]
    assert ours["of_exact_top10"] == 1.0
    assert all(value > 0 for value in ours.values())
    assert result["met"]["recall_p50_ms<=2.3"] == (ours["recall_p50_ms"] <= 2.3)
    assert result["ratios"]["recall_to_flat_faiss"] > 0


@pytest.mark.model
def test_agent_overhead():
    result = run("agent.py", "--parts", "overhead")
    assert result["benchmark"] == "agent"
    assert 0 < result["overhead"]["agentlab_ms"] < 1000
    assert 50 < result["overhead"]["prompt_tokens"] < 500  # they are counted by the real tokenizer


@pytest.mark.soak
def test_two_hundred_clients_for_a_minute_while_the_champion_changes_twice(tiny_model):
    result = run("serve.py", "--model", tiny_model)
    assert result["benchmark"] == "serve"
    assert (result["clients"], result["champion_swaps"]) == (200, 2)
    assert result["failed"] == 0, result["failures"]
    assert result["refused"] == {}
    assert len(result["answers_by_champion"]) == 3
    assert all(result["answers_by_champion"].values())
    assert result["exit_code"] == 0


def loaded(script):
    """The benchmark as a module, by its place: the tests have packages of such names."""
    spec = importlib.util.spec_from_file_location(f"{Path(script).stem}_benchmark", BENCHMARKS / script)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark


def test_agent_counts_as_solved_only_what_is(tmp_path):
    benchmark = loaded("agent.py")
    FUNCTIONS, is_solved = benchmark.FUNCTIONS, benchmark.is_solved

    from agentlab.tasks import load

    suite = load("toolcalls", tmp_path)
    item = next(i for i in suite.split("gate") if i.answer and i.answer["name"] == "light")
    arguments = {name: value["any"][0] if isinstance(value, dict) else value for name, value in
                 item.answer["arguments"].items()}  # fmt: skip

    def result(answer, *calls, state="answered"):
        steps = [SimpleNamespace(action={"name": name, "arguments": values}) for name, values in calls]
        return SimpleNamespace(reasoning_steps=steps, final_answer=answer, state=state)

    right = ("light", arguments)
    told = FUNCTIONS["light"](**arguments)
    assert is_solved(suite, item, result(told, right), FUNCTIONS)
    assert not is_solved(suite, item, result("It is done once.", right), FUNCTIONS)  # "on" in another word
    assert not is_solved(suite, item, result(told), FUNCTIONS)  # said, and never done
    assert not is_solved(suite, item, result(told, right, right), FUNCTIONS)
    assert not is_solved(suite, item, result(told, ("light", {**arguments, "room": "elsewhere"})), FUNCTIONS)
    assert not is_solved(suite, item, result(told, right, state="deadline"), FUNCTIONS)
    nothing = next(i for i in suite.split("gate") if i.answer is None)
    assert is_solved(suite, nothing, result("Rivers are long."), FUNCTIONS)
    assert not is_solved(suite, nothing, result("Rivers are long.", right), FUNCTIONS)


@pytest.mark.model
def test_locomo_counts_evidence_turns(tmp_path):
    turns = ["I adopted a beagle called Biscuit.", "How sweet!", "We went sailing on the lake.", "The soup was cold."]
    speakers = ["Ana", "Ben", "Ana", "Ben"]
    session = [
        {"speaker": speaker, "dia_id": f"D1:{i}", "text": text}
        for i, (speaker, text) in enumerate(zip(speakers, turns, strict=True))
    ]
    questions = [
        {"question": "What pet does Ana have?", "answer": "a beagle", "evidence": ["D1:0"], "category": 4},
        {"question": "Where did they sail?", "answer": "on the lake", "evidence": ["D1:2; D9:9"], "category": 1},
        {"question": "no evidence here", "answer": "", "evidence": ["D9:9"], "category": 1},
        {"question": "adversarial", "answer": "", "evidence": ["D1:1"], "category": 5},
    ]
    talk = {"session_1": session, "session_1_date_time": "1:56 pm on 8 May, 2023", "speaker_a": "Ana"}
    (tmp_path / "locomo").mkdir()
    conversations = [{"sample_id": "conv-0", "conversation": talk, "qa": questions}]
    (tmp_path / "locomo" / "locomo5.json").write_text(json.dumps(conversations))
    result = run("locomo.py", "--data", tmp_path)
    assert result["questions"] == 2
    assert result["recall_percent"]["memory"] == [100, 100, 100]
    assert set(result["recall_percent"]) == {"memory", "vectors", "words", "fusion"}
    assert run("locomo.py", "--data", tmp_path / "none") == {"benchmark": "locomo", "skipped": True}


@pytest.mark.parametrize("script", sorted(path.name for path in BENCHMARKS.glob("*.py")))
def test_help_needs_no_model(script):
    done = subprocess.run([sys.executable, str(BENCHMARKS / script), "--help"], capture_output=True, timeout=60)
    assert done.returncode == 0
    assert b"JSON" in done.stdout


def test_vram_rehearses_every_phase_without_a_gpu():
    result = run("vram.py", "--rehearse", "--serve-tokens", 200, "--batch", 3, "--train-tokens", 48)
    assert result["benchmark"] == "vram"
    assert [row["phase"] for row in result["phases"]] == ["serve", "evaluate", "train"]
    assert [row["error"] for row in result["phases"]] == ["", "", ""]
    assert all(row["predicted_mib"] > 0 and row["off_by_mib"] is None for row in result["phases"])
    assert result["met"] is None


@pytest.mark.parametrize("phases", ["train", pytest.param("serve,evaluate", marks=pytest.mark.soak)])
def test_what_operations_ask_for_is_what_the_ledger_predicts(phases):
    """With the libraries of today: what torch, transformers, PEFT, TRL and bitsandbytes hold, beside the weights."""
    sizes = ("--serve-tokens", 600, "--batch", 8, "--train-tokens", 200)
    result = run("vram.py", "--rehearse", "--traced", "--phases", phases, *sizes)
    assert [(row["phase"], row["error"]) for row in result["phases"]] == [(phase, "") for phase in phases.split(",")]
    for row in result["phases"]:
        beside = {name: row[f"{name}_mib"] - row["weights_mib"] for name in ("predicted", "allocated")}
        if row["phase"] == "evaluate":  # all tokens are taken for the prompt's, answers included
            assert 1 < beside["predicted"] / beside["allocated"] < 1.3
        else:
            assert beside["predicted"] == pytest.approx(beside["allocated"], rel=0.05)


def test_latency(tiny_model):
    size = ("--adapters", 2, "--rank", 4, "--tokens", 4, "--repeats", 1)
    result = run("latency.py", "--model", tiny_model, "--rung", "nf4", *size)
    assert result["benchmark"] == "latency"
    assert result["answers"] == sum(result["states"].values()) == 8
    assert 0 < result["first_p50_s"] <= result["answer_p50_s"] <= result["answer_p95_s"]
    assert result["target_met"] == (result["answer_p95_s"] <= result["target_s"])
    assert result["rung"] == "nf4"
    assert result["anew_gain"] > 0
    assert result["undrafted_gain"] > 0


def test_latency_opens_the_engine_as_a_run_does(tiny_model, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    latency, opened = loaded("latency.py"), []
    monkeypatch.setattr(
        "agentlab.inference.transformers_engine.TransformersEngine",
        lambda model, vram_gib, rung, device: opened.append((model.folder, vram_gib, rung)),
    )
    for words, expected in (
        (["--rung", "nf4"], (tiny_model, pytest.approx(4.65), "nf4")),  # the driver's context is not the allocator's
        (["--vram-gib", "6", "--context-gib", "0.6"], (tiny_model, pytest.approx(5.4), "auto")),
    ):
        options = latency.parser().parse_args(["--model", str(tiny_model), *words])
        latency.open_transformers(options, models.resolve(options.model))
        assert opened.pop() == expected
