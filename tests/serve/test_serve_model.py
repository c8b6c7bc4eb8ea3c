"""The real small model behind the endpoint: tools and memory work, and none of it is in the answer's text."""

import openai
import pytest
from serve_helpers import TOKEN, serving

from agentlab.agent import Options
from agentlab.lab import Lab

pytestmark = pytest.mark.model


def test_smollm2_answers_with_the_talk_and_the_memory(tmp_path, embedded):
    experiment = tmp_path / "experiments" / "small.yaml"
    experiment.parent.mkdir()
    experiment.write_text("name: small\nsuite: toolcalls\nmemory: {path: memory.db}\n")
    lab = Lab.open(experiment)
    lab.memory.remember("The user's cat is called Miezi.", memory_type="knowledge")
    with serving(lab, remember=True, options=Options(max_new_tokens=32)) as server:
        client = openai.OpenAI(base_url=server.url, api_key=TOKEN, max_retries=0)

        def ask(*talk, **fields):
            messages = [{"role": role, "content": text} for role, text in talk]
            return client.chat.completions.create(model="agentlab", messages=messages, **fields)

        france = ask(("user", "What is the capital of France?"), extra_body={"tool_choice": "none"})
        assert "Paris" in france.choices[0].message.content
        assert france.agentlab["adapter"] == "base"
        talk = [("user", "My name is Tomas."), ("assistant", "Nice to meet you, Tomas."), ("user", "What is my name?")]
        told = ask(*talk, extra_body={"tool_choice": "none"})
        assert told.usage.prompt_tokens > ask(talk[-1], extra_body={"tool_choice": "none"}).usage.prompt_tokens + 10
        cat = ask(("user", "What is the user's cat called?"), extra_body={"tool_choice": "none"})
        assert len(cat.agentlab["memories"]) == 1
        called = ask(("user", "What is 17 * 3?"), max_tokens=64, extra_body={"tool_choice": "required"})
        actions = [step["action"] for step in called.agentlab["steps"] if step["action"]]
        assert actions
        assert "<tool_call>" not in (called.choices[0].message.content or "")
        with client.chat.completions.create(
            model="agentlab", messages=[{"role": "user", "content": "What is the capital of France?"}], stream=True,
            extra_body={"tool_choice": "none"},
        ) as stream:  # fmt: skip
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == france.choices[0].message.content
