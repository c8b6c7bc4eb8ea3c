"""What of a request counts, and what is refused: parsing, content, access. Nothing is served here."""

import contextlib
import json
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentlab.errors import ServeError
from agentlab.serve.access import access, token_file
from agentlab.serve.asking import parse
from agentlab.serve.problems import Problem
from agentlab.serve.replies import Content

USER = {"role": "user", "content": "Hello?"}


def ask(**fields):
    return parse(json.dumps({"model": "agentlab", "messages": [USER], **fields}).encode())


def refused(**fields):
    with pytest.raises(Problem) as caught:
        ask(**fields)
    assert caught.value.status == 400
    assert set(caught.value.body()["error"]) == {"message", "type", "param", "code"}
    return caught.value


def test_the_last_user_message_is_the_task_and_the_rest_the_talk():
    found = ask(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": "One."},
            {"role": "assistant", "content": "Two.", "refusal": None, "tool_calls": None},
            {"role": "user", "content": [{"type": "text", "text": "Three"}, {"type": "text", "text": "four?"}]},
        ]
    )
    assert found.options["system"] == "Be brief.\nBe kind."
    assert found.task == "Three\nfour?"
    assert found.history == ({"role": "user", "content": "One."}, {"role": "assistant", "content": "Two."})


def test_user_messages_in_a_row_are_one_task():
    assert ask(messages=[USER, {"role": "user", "content": "Anybody?"}]).task == "Hello?\nAnybody?"


def test_options_of_the_agent():
    found = ask(
        max_completion_tokens=9, temperature=1, seed=4, stop="x", tool_choice="none", session_id="s", deadline_s=2,
        stream=True, stream_options={"include_usage": True}, user="tomas",
    )  # fmt: skip
    assert found.options == {
        "system": "", "max_new_tokens": 9, "temperature": 1.0, "seed": 4, "stop": ("x",), "tool_choice": "none",
    }  # fmt: skip
    assert (found.session_id, found.deadline_s, found.stream, found.include_usage) == ("s", 2.0, True, True)
    assert ask(stop=["a", "b"]).options["stop"] == ("a", "b")
    assert "max_new_tokens" not in ask().options


def test_fields_that_say_nothing_are_accepted():
    neutral = {
        "n": 1, "tools": [], "logprobs": False, "top_p": 1.0, "presence_penalty": 0, "frequency_penalty": 0.0,
        "response_format": {"type": "text"}, "logit_bias": {}, "store": False, "service_tier": "auto", "stop": None,
        "user": "tomas", "safety_identifier": "7f3a", "prompt_cache_key": "docs",
        "stream_options": {"include_obfuscation": False},
    }  # fmt: skip
    assert ask(**neutral) == ask()


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("n", 2), ("n", True), ("top_logprobs", False), ("logprobs", 0), ("presence_penalty", False),
        ("safety_identifier", 7), ("prompt_cache_key", ["a"]), ("stream_options", {"include_obfuscation": "no"}),
        ("tools", [{"type": "function"}]), ("functions", [{}]), ("response_format", {"type": "json_object"}),
        ("logprobs", True), ("top_p", 0.5), ("presence_penalty", 0.1), ("frequency_penalty", -1), ("store", True),
        ("logit_bias", {"5": 1}), ("metadata", {"a": "b"}), ("tool_choice", "always"), ("reasoning_effort", "high"),
        ("temperature", 3), ("temperature", "hot"), ("max_tokens", 0), ("max_tokens", 1.5), ("seed", 2**63),
        ("stop", ""), ("stop", ["a"] * 5), ("deadline_s", 0), ("session_id", ""), ("stream", "yes"),
        ("messages", []), ("messages", "hello"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(param, value):
    problem = refused(**{param: value})
    assert problem.param == param
    assert param in problem.message
    assert "\n" not in problem.message


def test_the_number_of_stop_strings_is_named():
    assert "4" in refused(stop=["a"] * 5).message
    assert len(ask(stop=["a"] * 4).options["stop"]) == 4


@pytest.mark.parametrize(
    "messages",
    [
        [USER, {"role": "assistant", "content": "I begin"}],
        [USER, {"role": "system", "content": "late"}, USER],
        [{"role": "system", "content": "alone"}],
        [{"role": "user", "content": "  \n "}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        [{"role": "user"}],
        [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, USER],
        [USER, {"role": "tool", "content": "42"}, USER],
        [{"role": "admin", "content": "hi"}],
        [{"role": "user", "content": "hi", "cache_control": {}}],
    ],
)
def test_talks_that_are_none_are_refused_with_their_place(messages):
    problem = refused(messages=messages)
    assert problem.message.startswith("messages[")
    assert problem.param.startswith("messages[")


def test_two_limits_that_differ_are_refused():
    assert refused(max_tokens=3, max_completion_tokens=4).param == "max_tokens"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[1]", b"\xff\xfe", b'{"messages": NaN}', b"[" * 100_000, b'{"n": ' + b"9" * 100_000 + b"}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
)  # fmt: skip
def test_bodies_that_are_no_request_are_refused(body):
    with pytest.raises(Problem) as caught:
        parse(body)
    assert caught.value.status == 400
    assert len(caught.value.message) < 600


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)
    )
)
def test_whatever_json_comes_is_parsed_or_refused(value):
    for body in (value, {"messages": value}, {"messages": [USER], "stop": value}, {"messages": [value]}):
        with contextlib.suppress(Problem):
            assert parse(json.dumps(body).encode()).task.strip()


# -- the text of a stream ---------------------------------------------------------------------------------------------


@given(st.lists(st.text(alphabet=" \nab", max_size=4)))
def test_pieces_together_are_the_stripped_answer(pieces):
    content = Content()
    shown = "".join(content.feed(piece) for piece in pieces)
    answer = "".join(pieces).strip()
    assert shown + content.finish(answer) == answer == content.text


def test_what_proved_to_be_no_answer_stays_a_paragraph_of_its_own():
    content = Content()
    shown = content.feed(" Let me see. ")
    content.turn_over()
    shown += content.feed(" It is")
    shown += content.feed(" 5.")
    assert shown + content.finish("It is 5.") == "Let me see.\n\nIt is 5."


def test_an_answer_that_was_not_written_is_shown_at_the_end():
    assert Content().finish("398") == "398"
    content = Content()
    content.feed("Half an ans")
    assert content.finish("The best there was") == "\n\nThe best there was"


# -- who may ask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_no_token_is_for_loopback_alone(host):
    with pytest.raises(ServeError, match="allowed: 127"):
        access(host, None)
    assert access(host, "x" * 16).hosts is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "LOCALHOST"])
def test_a_loopback_server_knows_its_names(host):
    rules = access(host, None)
    for name in ("localhost", "localhost:8400", "127.0.0.1:8400", "[::1]:8400", host.lower()):
        assert rules.allows_host(name) or ":" in host, name
    for name in ("evil.example", "evil.example:8400", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::2]"):
        assert not rules.allows_host(name), name


@pytest.mark.parametrize("token", ["short", "with blanks in the token", "", "ümlaut-in-the-token"])
def test_tokens_that_are_none_are_refused(token):
    with pytest.raises(ServeError, match="visible ASCII"):
        access("127.0.0.1", token)


def test_the_token_is_compared_whole():
    rules = access("0.0.0.0", "0123456789abcdef")
    assert rules.allows_token("Bearer 0123456789abcdef")
    assert rules.allows_token("bearer 0123456789abcdef")
    for wrong in ("", "Bearer", "Bearer 0123456789abcde", "Bearer 0123456789abcdefg", "Basic 0123456789abcdef", "ü ü"):
        assert not rules.allows_token(wrong)


@pytest.mark.parametrize("origin", ["localhost:3000", "http://a.b/path", "http://a.b/", "HTTP://a.b", "null", ""])
def test_origins_that_are_none_are_refused(origin):
    with pytest.raises(ServeError, match="--cors"):
        access("127.0.0.1", "x" * 16, (origin,))


def test_every_page_and_no_token_is_refused():
    with pytest.raises(ServeError, match="every web page"):
        access("127.0.0.1", None, ("*",))


def test_the_token_file_is_made_once_and_for_its_owner(tmp_path):
    path = tmp_path / "home" / "serve-token"
    token, new = token_file(path)
    assert new
    assert len(token) > 40
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert token_file(path) == (token, False)
    assert [file.name for file in path.parent.iterdir()] == ["serve-token"]


def test_a_token_file_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "serve-token"
    token_file(path)
    path.chmod(0o640)
    with pytest.raises(ServeError, match="chmod 600"):
        token_file(path)
    path.chmod(0o600)
    path.write_text("\n")
    with pytest.raises(ServeError, match="holds no token"):
        token_file(path)
