"""The structural tags of `toolformat.structure` in vLLM itself, in a process of its own."""

import json
import subprocess
import sys

import pytest
from support import has_vllm_for_cpus

pytestmark = [
    pytest.mark.soak,
    pytest.mark.model,
    pytest.mark.skipif(not has_vllm_for_cpus(), reason="vLLM is here for CUDA, not for CPUs"),
]

PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from agentlab.toolformat import structure, system_prompt

if __name__ == "__main__":
    folder, tools = json.loads(sys.argv[1])
    llm = LLM(model=folder, max_model_len=1024, dtype="float32", enforce_eager=True)
    tag = json.dumps(structure(tools, choice="required"))
    limits = StructuredOutputsParams(structural_tag=tag)
    system = {"role": "system", "content": system_prompt(tools)}
    tasks = ["Book 3 nights in Rome.", "How large is 2.5 by 4?", "Tell me a joke.", "Two rooms in Oslo with breakfast"]
    talks = [[system, {"role": "user", "content": task}] for task in tasks]
    found = llm.chat(talks, SamplingParams(temperature=0, max_tokens=200, structured_outputs=limits))
    print("\\nANSWERS" + json.dumps([[one.outputs[0].text, one.outputs[0].finish_reason] for one in found]))
"""


def test_vllm_writes_calls_that_parse_and_fit(embedded, tmp_path, monkeypatch):
    from agentlab.agent import tool
    from agentlab.toolformat import TAGS, parse_calls, validate

    def book(city: str, nights: int, extras: list[str] | None = None) -> str:
        """Book a hotel."""
        return city

    def area(width: float, height: float) -> float:
        """The area of a rectangle."""
        return width * height

    tools = {one.name: one.definition for one in (tool(book), tool(area))}
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program), json.dumps([str(embedded.folder), list(tools.values())])],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    # vLLM logs to the same stream, before the line and after it
    answers = json.loads(done.stdout.split("ANSWERS")[-1].splitlines()[0])
    assert len(answers) == 4
    whole = [text for text, finish in answers if finish == "stop"]
    assert whole, answers
    for text in whole:  # vLLM itself cuts the others off at their limit; the engine's conformance suite has them closed
        (call,) = parse_calls(text)
        assert validate(call, tools[call.name]) == [], text
    for text, _ in answers:
        assert text.startswith(TAGS.open), text
