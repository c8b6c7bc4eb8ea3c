"""`agentlab plan`: text for people, JSON for machines, exit codes."""

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from agentlab import Lab
from agentlab.cli import main
from agentlab.hardware.monitor import Gpu
from agentlab.records import BaseModelRecord

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_text_says_what_fits_and_what_does_not():
    result = run("plan", EXPERIMENTS / "laptop-6gb-r1.yaml")
    assert result.exit_code == 0, result.output
    for part in (
        "of which 5.00 GiB may be used", "serve: does NOT fit", "train: does NOT fit", "2.03 GiB", "what would fit:",
        "cannot meet the target without a token budget", "from its published config",
        "estimate of a generation in the mean", "NOT everything fits: primary model at nf4, fallback model at nf4",
    ):  # fmt: skip
        assert part in result.output
    fine = run("plan", EXPERIMENTS / "laptop-6gb.yaml").output
    assert "everything fits" in fine
    assert "NOT" not in fine


def train_total(text):
    return int(re.search(r"train: .*?together +([\d,]+)", text, re.DOTALL)[1].replace(",", ""))


def test_what_vllm_would_take_is_planned_where_it_answers():
    on_vllm = ("--set", "model.engine=vllm")
    fine = run("plan", EXPERIMENTS / "laptop-6gb.yaml", *on_vllm).output
    assert "weights on vLLM in 16 bits, trained at bf16" in fine
    assert "8,192 tokens of context, 4 resident adapters" in fine
    assert "everything fits" in fine
    (_, beside) = fine.split("  train: ", 1)  # training has the card while vLLM sleeps, which keeps its context
    assert re.search(r"driver context +358\n +vllm asleep +512\n", beside)
    alone = run("plan", EXPERIMENTS / "laptop-6gb.yaml").output
    assert train_total(fine) - train_total(alone) == 512
    small = (*on_vllm, "--set", "budget.vram_gib=3.3")
    values = json.loads(run("plan", EXPERIMENTS / "laptop-6gb.yaml", *small, "--json").output)["models"][0]
    assert [(phase["name"], phase["fits"]) for phase in values["phases"]] == [
        ("serve", False), ("evaluate", False), ("train", True)
    ]  # fmt: skip
    assert (values["answers_on"], values["remedies"]) == ("vllm", ["model.engine=transformers, at int8"])
    assert "NOT everything fits: primary model on vLLM in 16 bits" in run(
        "plan", EXPERIMENTS / "laptop-6gb.yaml", *small
    ).output  # fmt: skip


def test_a_plan_reads_no_model_whatever_would_answer(tmp_path, monkeypatch):
    # a project of its own: in the checkout's, a demo that has run is bound to the engine that it ran on
    demo = tmp_path / "experiments" / "demo.yaml"
    demo.parent.mkdir()
    shutil.copy(EXPERIMENTS / "demo.yaml", demo)
    monkeypatch.setattr("agentlab.models.resolve", lambda *_: pytest.fail("a model was opened"))
    assert "on vLLM" not in run("plan", demo).output
    monkeypatch.setattr("agentlab.inference.vllm_build.build", lambda: "cuda")
    monkeypatch.setattr("agentlab.hardware.monitor.accelerator", lambda: "cuda")
    assert "on vLLM" not in run("plan", demo).output  # so small a model is not worth its start
    assert "1.54 billion weights on vLLM in 16 bits" in run("plan", EXPERIMENTS / "laptop-6gb.yaml").output
    scarce = run("plan", EXPERIMENTS / "laptop-6gb.yaml", "--set", "budget.vram_gib=3.3").output
    assert "weights at int8" in scarce  # where vLLM does not fit `auto` is transformers
    quantized = run("plan", demo, "--set", "model.rung=nf4").output
    assert "0.13 billion weights at nf4" in quantized  # nor where it would load something else than was asked for


def test_modules_that_the_model_does_not_have_are_refused():
    for names, unknown in (("[foo]", "'foo'"), ("[q_proj, lm_head]", "'lm_head'")):
        found = run("plan", EXPERIMENTS / "laptop-6gb.yaml", "--set", f"lora.target_modules={names}")
        assert found.exit_code == 2
        assert f"key lora.target_modules: {unknown}; allowed for Qwen/Qwen2.5-1.5B-Instruct: q_proj, k" in found.output


@pytest.mark.parametrize(("wanted", "said"), [(4, "batches of 4,"), (200, "batches of 32 (wanted: 200),")])
def test_vllms_batches_are_no_larger_than_asked_for(monkeypatch, wanted, said):
    monkeypatch.setattr("agentlab.inference.vllm_build.build", lambda: "cuda")
    monkeypatch.setattr("agentlab.hardware.monitor.accelerator", lambda: "cuda")
    options = ("--set", "model.engine=vllm", "--set", f"evaluation.batch_size={wanted}")
    assert said in run("plan", EXPERIMENTS / "laptop-6gb.yaml", *options).output


@pytest.mark.parametrize("key", ["vram_gib", "latency_s"])
def test_a_budget_beyond_any_machine_is_refused(key):
    found = run("plan", EXPERIMENTS / "laptop-6gb.yaml", "--set", f"budget.{key}=1e300")
    assert found.exit_code == 2
    assert f"in --set: key budget.{key}: 1e+300; allowed: less than or equal to " in found.output


@pytest.mark.parametrize("card_gib", [4, 6])
def test_vllm_is_planned_within_a_card_that_is_smaller_than_the_budget(monkeypatch, card_gib):
    monkeypatch.setattr("agentlab.hardware.monitor.gpus", lambda: [Gpu("Card", card_gib * 1024.0)])
    monkeypatch.setattr("agentlab.hardware.monitor.accelerator", lambda: "cuda")
    options = ("--set", "model.engine=vllm", "--set", "budget.vram_gib=24", "--json")
    small = ("--set", "model.primary=Qwen/Qwen2.5-0.5B-Instruct") if card_gib == 4 else ()
    model = json.loads(run("plan", EXPERIMENTS / "laptop-6gb.yaml", *options, *small).output)["models"][0]
    assert (model["answers_on"], model["fits"]) == ("vllm", True)
    by_name = {phase["name"]: phase for phase in model["phases"]}
    assert by_name["evaluate"]["lines_bytes"]["learner_context"] > 0


def test_what_was_planned_compares_with_what_an_allocator_shows(tiny_experiment, monkeypatch):
    run_ = Lab.open(tiny_experiment).run
    lines = {"weights": 3 * 2**20, "driver_context": 2**20, "learner_context": 2**20, "vllm_asleep": 2**20}
    phase = {"name": "train", "fits": True, "total_bytes": 6 * 2**20, "limit_bytes": 2**30, "lines_bytes": lines}
    plan = Lab.open(tiny_experiment).plan().as_dict()
    plan["models"][0]["phases"] = [plan["models"][0]["phases"][0] | phase]
    run_.save_plan(plan)
    assert run_.planned_mib() == {"train": 3.0}


def test_a_run_that_began_on_transformers_is_planned_so(tiny_experiment, monkeypatch):
    monkeypatch.setattr("agentlab.inference.vllm_build.build", lambda: "cuda")
    monkeypatch.setattr("agentlab.hardware.monitor.accelerator", lambda: "cuda")
    monkeypatch.setattr("agentlab.inference.opening._WORTH_BYTES", 0)
    lab = Lab.open(tiny_experiment)
    assert lab.plan().models[0].answers_on == "vllm"
    lab.run.save_model(BaseModelRecord(name="tiny", sha256="0"))
    assert lab.plan().models[0].answers_on == "transformers"


def test_a_rung_that_vllm_does_not_load_on_the_device_is_refused_before_it_is_planned():
    refused = run("plan", EXPERIMENTS / "laptop-6gb.yaml", "--set", "model.engine=vllm", "--set", "model.rung=fp32")
    assert refused.exit_code == 2
    assert "key model.rung: 'fp32'; allowed where vLLM answers on a GPU: auto, bf16" in refused.output


def test_vllms_speed_and_context_are_its_own():
    on_vllm = ("--set", "model.engine=vllm")
    usual = json.loads(run("plan", EXPERIMENTS / "laptop-6gb.yaml", *on_vllm, "--json").output)["models"][0]
    scarce = (*on_vllm, "--set", "budget.vram_gib=4.2", "--set", "evaluation.max_new_tokens=2500")
    small = json.loads(run("plan", EXPERIMENTS / "laptop-6gb.yaml", *scarce, "--json").output)["models"][0]
    assert small["estimate"]["decode_tokens_per_s"] == usual["estimate"]["decode_tokens_per_s"]  # 16 bits in both
    assert not any("would be started with a context" in note for note in usual["notes"])
    assert any("a context of 2,048 tokens, and the longest item takes 2,6" in note for note in small["notes"])


def test_json_is_the_same_plan():
    result = run("plan", EXPERIMENTS / "laptop-6gb-r1.yaml", "--json", "--set", "budget.vram_gib=8")
    values = json.loads(result.output)
    assert values["experiment"] == "laptop-6gb-r1"
    assert [model["fits"] for model in values["models"]] == [True, True, True]
    assert values["models"][0]["phases"][0]["limit_bytes"] == 8 * 2**30


def test_a_plan_for_the_cpu_counts_ram():
    result = run("plan", EXPERIMENTS / "demo.yaml", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "this CPU's RAM" in result.output
    assert "at fp32" in result.output


def test_a_model_that_nobody_knows_is_exit_code_3():
    result = run("plan", EXPERIMENTS / "laptop-6gb.yaml", "--set", "model.primary=org/unknown")
    assert result.exit_code == 3
    assert "agentlab models get org/unknown" in result.output


def test_a_model_on_a_server_is_not_planned():
    server = ("--set", "model.engine=openai", "--set", "model.base_url=http://localhost:11434/v1")
    result = run("plan", EXPERIMENTS / "laptop-6gb.yaml", *server)
    assert result.exit_code == 2
    assert "model.engine: 'openai'; allowed for a plan: auto, transformers, vllm" in result.output


def test_a_run_that_cannot_fit_is_exit_code_12(tiny_experiment):
    result = run("evolve", tiny_experiment, "--set", "budget.ram_fraction=1.0e-6")
    assert result.exit_code == 12, result.output
    assert "does not fit at fp32" in result.output
    assert "budget.ram_fraction" in result.output
    assert "Traceback" not in result.output


def planned(experiment, *options):
    """The plan as values."""
    result = run("plan", EXPERIMENTS / experiment, "--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_what_is_not_fp32_is_no_faster_on_a_cpu_and_its_tables_are():
    rates = {}
    for rung in ("fp32", "nf4"):
        found = planned("laptop-6gb-r1.yaml", "--device", "cpu", "--set", f"model.rung={rung}")
        rates[rung] = found["models"][0]["estimate"]["decode_tokens_per_s"]
        notes = found["models"][0]["notes"]
        assert any("stay at 32 bits on every rung: 4.06 GiB" in note for note in notes)
    assert rates["nf4"] == pytest.approx(0.55 * rates["fp32"])


def test_vllms_process_on_a_cpu_is_counted():
    for engine, processes in (("transformers", 1), ("vllm", 2)):
        found = planned("demo.yaml", "--device", "cpu", "--set", f"model.engine={engine}")
        (model,) = found["models"]
        lines = model["phases"][0]["lines_bytes"]
        assert (model["answers_on"], lines["process"]) == (engine, processes * 2**30)
