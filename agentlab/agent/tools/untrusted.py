"""Text that a model should read but that must not act: no chat turn, no tool call, no end of a thought in it."""

import re
import unicodedata

# What chat templates and tool formats begin a token or a tag with. The opening bracket alone is replaced: without it
# neither a tokenizer nor a parser finds anything, and a person still reads the same words.
_TAGS = (
    "tool_calls?|tool_call_begin|tool_response|tool_result|tool_output|tools?|think|thinking|thought|reasoning|"
    "function_call|function_calls|function_results|functioncall|invoke|functions?|parameter|observation|system|user|"
    "assistant|answer|final_answer|start_of_turn|end_of_turn|end_of_utterance|begin_of_text|end_of_text|eot_id|im_start|"
    "im_end|im_sep|start_of_image|end_of_image|filename|reponame|"
    "s|bos|eos|sop|eop|cls|sep|pad|unk|mask|sys|unused\\d+|extra_id_\\d+|reserved_\\w*|special_\\w*"
)
_BRACKETED = (
    "inst|sys|system_prompt|tool_calls|tool_results|available_tools|model_settings|tool_content|args|call_id|think|img|"
    "img_break|img_end|prefix|middle|suffix|begin_audio|audio|gmask|sop|mask|cls|sep|bos|eos|pad|unk|control_\\d+"
)
_OPENING = re.compile(  # blanks are never given back: a run of them would take time by its square
    rf"<(?=\s*+\|)|<(?=\s*+[/\\]?\s*+(?:{_TAGS})(?:[\s>/=|:]|$))|<(?=<\s*+/?\s*+sys)|\[(?=\s*+/?\s*+(?:{_BRACKETED})\s*\])"
    # also cut short: what follows in the prompt could complete it
    r"|<(?=/?tool)"
    # names like <file_sep> and <seed:tool_call>: every model has some of its own, and ordinary markup has hardly any
    r"|<(?=\s*+[/\\]?\s*+[a-z0-9]*(?:_|:(?!:))\w[\w:]*\s*>)|\u25c1(?=\s*+/?\s*+think)",
    re.IGNORECASE,
)
_HARMLESS = {"<": "\u2039", "[": "\u27e6", "\u25c1": "\u2039"}  # ‹ and ⟦: no normalisation turns them back
_INVISIBLE = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # fillers that have a category of letters or symbols


def as_untrusted(text: str) -> str:
    """`text` in which nothing is a special token or a tag of a known model any more; as long as before and as readable.

    Found are also those with zero-width or combining characters inside and those in fullwidth or other compatibility
    forms, because a tokenizer's normaliser would undo these. Pure and idempotent.
    """
    shadow, places = _shadow(text)
    found = {places[match.start()]: _HARMLESS[match.group()] for match in _OPENING.finditer(shadow)}
    if not found:
        return text
    return "".join(found.get(place, char) for place, char in enumerate(text))


def _shadow(text: str) -> tuple[str, list[int] | range]:
    """What a normaliser could make of `text`, and for each of its characters where in `text` it comes from."""
    if text.isascii() and text.isprintable():
        return text, range(len(text))
    characters: list[str] = []
    places: list[int] = []
    for place, char in enumerate(text):
        if not char.isspace() and (
            char in _INVISIBLE or unicodedata.category(char) in ("Cf", "Cc", "Mn", "Me", "Cs", "Cn", "Co")
        ):
            continue
        for made in unicodedata.normalize("NFKC", char) if char > "\x7f" else char:
            characters.append(made)
            places.append(place)
    return "".join(characters), places
