"""Answers under a grammar on a model that babbles: strings, numbers and lists that never end by themselves."""

import json
import subprocess
import sys

import pytest
from conformance import CHAT
from structured_schemas import LOOSE_TOOLS, TOOLS

from agentlab import models
from agentlab.inference import EngineError, Request
from agentlab.inference.transformers_engine import TransformersEngine
from agentlab.toolformat import REACT, TAGS, CallStyle, parse_calls, structure, validate

LLAMA = CallStyle("", "", "parameters")
HERMES = CallStyle("<tool_call>\n", "\n</tool_call>")
MISTRAL = CallStyle("[TOOL_CALLS] [", "]")
STYLES = [TAGS, HERMES, LLAMA, MISTRAL, REACT]
IDS = ["tags", "hermes", "llama", "mistral", "react"]


@pytest.fixture(scope="module")
def engine(tiny_model):
    with TransformersEngine(models.resolve(str(tiny_model))) as engine:
        yield engine


def needed(engine, tag):
    return engine._grammars.grammar(tag).tokens_needed


def requests_for(engine, tag, seeds, slack=(0, 1, 7, 40)):
    least = needed(engine, tag)
    return [
        Request(
            CHAT, max_new_tokens=least + slack[seed % len(slack)], temperature=temperature, seed=seed, structure=tag
        )
        for seed in seeds
        for temperature in (0.0, 0.7, 2.0)
    ]


@pytest.mark.parametrize("style", STYLES, ids=IDS)
@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool["name"])
def test_a_required_call_is_complete_and_fits_its_tool_however_few_tokens_there_are(engine, tool, style):
    for completion in engine.generate(requests_for(engine, structure([tool], style, "required"), range(4))):
        (call,) = parse_calls(completion.text, style)
        assert validate(call, tool) == [], completion.text
        assert completion.finish_reason == "stop"


@pytest.mark.parametrize("tool", LOOSE_TOOLS, ids=lambda tool: tool["name"])
def test_schemas_that_cannot_be_compiled_are_loosened(engine, tool):
    for completion in engine.generate(requests_for(engine, structure([tool], TAGS, "required"), range(2))):
        (call,) = parse_calls(completion.text)
        assert (call.name, call.malformed) == (tool["name"], None)
        assert set(tool["parameters"]["required"]) <= set(call.arguments)


@pytest.mark.parametrize("style", STYLES, ids=IDS)
def test_one_of_many_tools(engine, style):
    tag = structure(TOOLS, style, "required")
    by_name = {tool["name"]: tool for tool in TOOLS}
    requests = requests_for(engine, tag, range(12), slack=(0, 3, 50, 150))
    names = set()
    for completion in engine.generate(requests):
        (call,) = parse_calls(completion.text, style)
        assert call.name in by_name
        assert validate(call, by_name[call.name]) == []
        names.add(call.name)
    assert len(names) > 1


@pytest.mark.parametrize("style", STYLES, ids=IDS)
def test_a_call_begun_in_free_text_is_finished_and_ends_the_answer(engine, style):
    """The babbler never writes an opening tag, so it is made to: with no room, one token of room and much."""
    tools = TOOLS[1:3]
    tag = structure(tools, style, "auto")
    least = needed(engine, tag)
    opening = engine.encode(style.trigger)
    for before, slack in ((0, 0), (0, 1), (3, 0), (5, 30)):
        row = one_row(engine, tag, least + before + slack)
        spoken = engine.encode("x" * before) + opening
        chosen = [pick(row, token) for token in spoken]
        assert chosen == spoken
        text = style.trigger + babble(engine, row, "z")
        (call,) = parse_calls(text, style)
        assert any(validate(call, tool) == [] for tool in tools), text
    row = one_row(engine, tag, least + 2)
    chosen = [pick(row, token) for token in [*engine.encode("xxx"), *opening]]
    assert chosen[:3] == engine.encode("xxx")
    assert chosen != [*engine.encode("xxx"), *opening]  # one token short of the room for a call


def one_row(engine, tag, limit):
    from agentlab.inference.constrained import Row

    return Row(engine._grammars, engine._grammars.grammar(tag), limit)


def pick(row, wanted):
    """What is chosen where the model wants one token above all and others by their number."""
    import torch
    import xgrammar

    width = row.grammars.info.vocab_size
    mask = xgrammar.allocate_token_bitmask(1, width)
    row.matcher.fill_next_token_bitmask(mask)
    scores = -torch.arange(width, dtype=torch.float32)[None]
    scores[0, wanted] = 1.0
    xgrammar.apply_token_bitmask_inplace(scores, mask, vocab_size=width)
    return row.choose(scores[0], int(scores[0].argmax()))


def babble(engine, row, letter):
    """The text of a model that wants nothing but one letter."""
    tokens = []
    (wanted,) = engine.encode(letter)
    while not row.finished:
        tokens.append(pick(row, wanted))
        if row.matcher.is_completed() and row.path == []:
            break
    return engine._decode(tokens)


@pytest.mark.parametrize("style", STYLES, ids=IDS)
def test_free_text_in_which_no_call_can_begin(engine, style):
    tag = structure(TOOLS, style, "none")
    requests = [Request(CHAT, max_new_tokens=60, temperature=1.0, seed=seed, structure=tag) for seed in range(4)]
    assert all(parse_calls(completion.text, style) == [] for completion in engine.generate(requests))
    row = one_row(engine, tag, 80)
    *opening, last = engine.encode(style.trigger)
    assert [pick(row, token) for token in opening] == opening
    assert pick(row, last) != last


def test_auto_leaves_text_free(engine):
    plain = Request(CHAT, max_new_tokens=60, temperature=1.0, seed=3)
    tag = structure(TOOLS[:2], TAGS, "auto")
    free, under = engine.generate([plain, Request(CHAT, max_new_tokens=60, temperature=1.0, seed=3, structure=tag)])
    same = next((i for i, (a, b) in enumerate(zip(under.token_ids, free.token_ids, strict=False)) if a != b), 60)
    assert same == 60 or free.token_ids[same] in (0, 1)  # control tokens are the only ones barred


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_words_that_their_limit_cuts_off_are_told_from_whole_ones(engine, choice):
    """Free text may end anywhere, so a limit in the middle of it is no end: without a grammar it is none either."""
    tag = structure(TOOLS[:2], TAGS, choice)
    free, under = (Request(CHAT, max_new_tokens=20, temperature=1.0, seed=3, structure=one) for one in (None, tag))
    assert {completion.finish_reason for completion in engine.generate([free, under])} == {"length"}
    *_, last = engine.stream(under)
    assert (last.completion.finish_reason, last.completion.completion_tokens) == ("length", 20)


def test_structured_and_free_rows_in_one_batch_answer_as_alone(engine):
    tags = [structure([tool], TAGS, "required") for tool in TOOLS[:3]]
    requests = [Request(CHAT, max_new_tokens=70, seed=1, temperature=0.5)]
    requests += [
        Request(CHAT, max_new_tokens=60 + 20 * i, structure=tag, logprobs=i == 1) for i, tag in enumerate(tags)
    ]
    requests += [Request(CHAT, max_new_tokens=20)]
    together = engine.generate(requests)
    alone = [engine.generate([request])[0] for request in requests]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert together[2].logprobs is not None
    assert len(together[2].logprobs) == together[2].completion_tokens


def test_several_calls_where_asked_for(engine):
    for style in (TAGS, MISTRAL):
        tag = structure(TOOLS[:2], style, "required", calls="many")
        for completion in engine.generate(requests_for(engine, tag, range(6), slack=(0, 30, 150))):
            calls = parse_calls(completion.text, style)
            assert calls
            assert all(call.malformed is None for call in calls), completion.text


def test_a_limit_too_small_for_any_call_is_refused_with_the_number_needed(engine):
    tag = structure(TOOLS[1:2], TAGS, "required")
    least = needed(engine, tag)
    with pytest.raises(EngineError, match=f"{least - 1} is too small.*{least}"):
        engine.generate([Request(CHAT, max_new_tokens=least - 1, structure=tag)])
    assert least == len('<tool_call>{"name": "weather.get", "arguments": {"city": ""}}</tool_call>')


def test_what_is_no_structural_tag_is_refused(engine):
    with pytest.raises(EngineError, match="structural tag"):
        engine.generate([Request(CHAT, structure={"type": "structural_tag", "format": {"type": "poem"}})])


def test_any_structural_tag_is_followed_to_its_end(engine):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    }
    tag = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": schema}}
    for completion in engine.generate(requests_for(engine, tag, range(8))):
        assert set(json.loads(completion.text)) == {"a", "b"}


def test_json_is_written_as_json_dumps_writes_it(engine):
    tag = structure(TOOLS, TAGS, "required")
    for completion in engine.generate(requests_for(engine, tag, range(6), slack=(60, 120))):
        (call,) = parse_calls(completion.text)
        body = completion.text.removeprefix("<tool_call>").removesuffix("</tool_call>")
        assert body.startswith(f'{{"name": {json.dumps(call.name, ensure_ascii=False)}, "arguments": {{')
        if not set(body) & set(".eE\\/") and '["' not in body:
            assert body == json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)


@pytest.fixture(scope="module")
def merged():
    """Grammars of a tokenizer whose tokens are of many lengths, across the borders of JSON's own."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as tokenizer_models
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    from agentlab.inference.grammars import Grammars

    raw = Tokenizer(tokenizer_models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [str(structure([tool], TAGS, "required")) for tool in TOOLS]
    texts += [f'<tool_call>{{"name": "{n}", "arguments": {{"a": "x", "b": ["y"]}}}}</tool_call>' for n in range(40)]
    raw.train_from_iterator(texts, BpeTrainer(vocab_size=900, special_tokens=["<end>"], initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")
    return Grammars(tokenizer, len(tokenizer), {0}, {0})


@pytest.mark.parametrize("choice", ["required", "auto"])
@pytest.mark.parametrize("style", STYLES, ids=IDS)
def test_calls_are_complete_with_tokens_of_any_length(merged, style, choice):
    import torch

    from agentlab.inference.constrained import Constrained, Row

    by_name = {tool["name"]: tool for tool in TOOLS}
    tags = [structure([tool], style, choice) for tool in TOOLS] + [structure(TOOLS, style, choice)]
    generator = torch.Generator().manual_seed(0)
    opening = merged.encode(style.trigger.encode())
    calls = 0
    for slack in (0, 1, 2, 5, 20, 60):
        rows = [Row(merged, merged.grammar(tag), merged.grammar(tag).tokens_needed + slack) for tag in tags]
        processor = Constrained(merged, rows)
        texts = [b""] * len(rows)
        step = 0
        while not all(row.finished for row in rows):
            scores = torch.randn(len(rows), merged.info.vocab_size, generator=generator)
            wish = opening[step - slack // 4] if 0 <= step - slack // 4 < len(opening) else None
            if wish is not None and choice == "auto":
                scores[:, wish] += 100
            running = [not row.finished for row in rows]
            chosen = processor(torch.zeros(len(rows), 1, dtype=torch.long), scores).argmax(-1).tolist()
            for index, token in enumerate(chosen):
                if running[index] and token not in merged.stop_ids:
                    texts[index] += merged.pieces[token]
            step += 1
        for text in (text.decode(errors="replace") for text in texts):
            found = parse_calls(text, style)
            calls += len(found)
            assert len(found) == 1 or choice == "auto"
            assert all(call.name in by_name and validate(call, by_name[call.name]) == [] for call in found), text
    assert calls > 20


def test_free_answers_need_no_xgrammar(tiny_model):
    code = (
        "import sys; sys.modules['xgrammar'] = None; from agentlab import models; "
        "from agentlab.inference import Request; "
        "from agentlab.inference.transformers_engine import TransformersEngine; "
        f"engine = TransformersEngine(models.resolve({str(tiny_model)!r})); "
        "print(len(engine.generate([Request([{'role': 'user', 'content': 'hello'}], max_new_tokens=2)])))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr[-2000:]
