"""Native tool calls: engines whose chat templates are those of three families of models."""

import pytest
from conformance import CHAT, TOOLS, is_one_call
from toolformat_templates import LLAMA, MISTRAL, PYTHONIC, QWEN

from agentlab import models
from agentlab.inference import EngineError, Request
from agentlab.inference.transformers_engine import TransformersEngine
from agentlab.toolformat import CallStyle, parse_calls, structure

FAMILIES = {
    "qwen": (QWEN, CallStyle("<tool_call>\n", "\n</tool_call>")),
    "llama": (LLAMA, CallStyle("", "", "parameters")),
    "mistral": (MISTRAL, CallStyle("[TOOL_CALLS] [", "]", ignored_keys=("id",))),
}


def engine_with(tiny_model, folder, template, special=()):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template
    tokenizer.add_tokens(list(special), special_tokens=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(len(tokenizer))
    model.config.max_position_embeddings = 4096  # the tools shown are many tokens of one byte
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return TransformersEngine(models.resolve(str(folder)))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tiny_model, tmp_path_factory):
    template, style = FAMILIES[request.param]
    special = ["[TOOL_CALLS]", "[INST]"] if request.param == "mistral" else ["<|eot_id|>"]
    with engine_with(tiny_model, tmp_path_factory.mktemp(request.param), template, special) as engine:
        yield engine, style


def test_calls_are_written_and_read_as_the_template_writes_them(family):
    engine, style = family
    assert engine.call_style() == style
    tag = structure(TOOLS, style, "required")
    requests = [
        Request(CHAT, None, 140 + 40 * seed, float(seed % 2), seed, structure=tag, tools=TOOLS) for seed in range(6)
    ]
    for completion in engine.generate(requests):
        assert is_one_call(completion.text, style), completion.text
    chunks = list(engine.stream(requests[0]))
    assert "".join(chunk.text for chunk in chunks) == engine.generate(requests[:1])[0].text


def test_tools_and_earlier_calls_are_part_of_the_prompt(family):
    engine, style = family
    call = {"id": "call12345", "type": "function", "function": {"name": "count", "arguments": {"order": "up"}}}
    chat = [*CHAT, {"role": "assistant", "content": "", "tool_calls": [call]}]
    text = engine.render(chat, TOOLS)
    assert "rivers.length" in text
    written = text[text.rindex(style.begin("count")) :].partition("<|" if style.open != "[TOOL_CALLS] [" else "</s>")[0]
    assert [(found.name, found.arguments) for found in parse_calls(written, style)] == [("count", {"order": "up"})]
    assert engine.count_tokens(chat, TOOLS) == len(engine.encode(text))


def test_a_special_token_of_the_calls_is_text_and_others_are_not(tiny_model, tmp_path):
    with engine_with(tiny_model, tmp_path, MISTRAL, ["[TOOL_CALLS]", "[INST]"]) as engine:
        tokens = engine.encode('[INST]x[TOOL_CALLS] [{"name": "count", "arguments": {}}]')
        assert engine._decode(tokens) == 'x[TOOL_CALLS] [{"name": "count", "arguments": {}}]'
        grammars = engine._grammars
        assert grammars.encode(b"[TOOL_CALLS]") == engine.encode("[TOOL_CALLS]")
        assert len(grammars.encode(b"[INST]")) == len("[INST]")


def test_a_template_that_writes_unreadable_calls_still_shows_tools(tiny_model, tmp_path):
    with engine_with(tiny_model, tmp_path, PYTHONIC) as engine:
        assert engine.call_style() is None
        assert "rivers.length" in engine.render(CHAT, TOOLS)


def test_a_chat_that_the_template_refuses_is_an_engine_error(tiny_model, tmp_path):
    with (
        engine_with(tiny_model, tmp_path, "{{ raise_exception('roles must alternate') }}") as engine,
        pytest.raises(EngineError, match="roles must alternate"),
    ):
        engine.generate([Request(CHAT, max_new_tokens=2)])
