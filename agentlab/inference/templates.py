"""Chats as tokens and tokens as text: what every engine does whose model's tokenizer is on this machine."""

import abc
import functools
from collections.abc import Sequence
from typing import Any

import jinja2

from agentlab.inference.contract import Engine, EngineError, LimitTooSmallError, Request
from agentlab.inference.grammars import Grammars
from agentlab.models import ModelFiles
from agentlab.toolformat import CallStyle, Tool, shows_tools, style_of_template, template_tools


class TemplatedEngine(Engine):
    """An engine with the tokenizer and the chat template of its model; a subclass loads them and answers."""

    model_files: ModelFiles
    tokenizer: Any

    @abc.abstractmethod
    def _end_token_ids(self) -> set[int]:
        """Tokens that end an answer, by the model's generation config."""

    @abc.abstractmethod
    def _vocabulary_size(self) -> int:
        """Width of the model's logits, which may exceed the tokenizer's vocabulary."""

    def render(self, messages: list[dict[str, Any]], tools: Sequence[Tool] | None = None) -> str:
        """The prompt text as the chat template writes it, ending where the answer begins.

        Raises EngineError for tools that the template does not show, and for messages that it refuses.
        """
        if tools and not self._shows_tools:
            raise EngineError(f"the chat template of {self.model_files.name} shows no tools")
        try:
            return self._apply_template(messages, template_tools(tools) if tools else None, True)
        except jinja2.TemplateError as error:
            raise EngineError(f"the chat template of {self.model_files.name} refuses the chat: {error}") from None

    def _apply_template(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool = False
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
        )

    @functools.cached_property
    def _shows_tools(self) -> bool:
        return shows_tools(self._apply_template)

    @functools.cached_property
    def _style(self) -> CallStyle | None:
        return style_of_template(self._apply_template)

    def call_style(self) -> CallStyle | None:
        return self._style

    @functools.cached_property
    def _control_ids(self) -> frozenset[int]:
        """Special tokens that are no text: all but those in which the model's own calls are written."""
        style = self.call_style()
        tags = "" if style is None else style.open + style.close
        names = dict(zip(self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens, strict=True))
        names |= {token: added.content for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        return frozenset(token for token, name in names.items() if name not in tags)

    @functools.cached_property
    def _stop_ids(self) -> frozenset[int]:
        return frozenset({*self._end_token_ids(), self.tokenizer.eos_token_id} - {None})

    @functools.cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self._vocabulary_size(), self._stop_ids, self._control_ids)

    def _decode(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens without special ones, but for those of the model's own calls."""
        text = [token for token in tokens if token not in self._control_ids]
        return str(self.tokenizer.decode(text, skip_special_tokens=False))

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text (the template has written the special tokens already)."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def count_tokens(self, messages: list[dict[str, Any]], tools: Sequence[Tool] | None = None) -> int:
        return len(self.encode(self.render(messages, tools)))

    def opens_thought(self, messages: list[dict[str, Any]]) -> bool:
        return self.render(messages).rstrip().endswith("<think>")

    def _checked_prompt(self, request: Request) -> list[int]:
        """The prompt's tokens. Raises EngineError where answer and prompt do not fit, LimitTooSmallError."""
        prompt = self.encode(self.render(request.messages, request.tools))
        if request.structure is not None:
            grammar = self._grammars.grammar(request.structure)
            needed = grammar.tokens_needed
            if grammar.required and needed > request.max_new_tokens:
                raise LimitTooSmallError(
                    f"max_new_tokens {request.max_new_tokens} is too small for any call; the shortest needs {needed}"
                )
        if len(prompt) + request.max_new_tokens > self.context_length():
            raise EngineError(
                f"a prompt of {len(prompt)} tokens and {request.max_new_tokens} new ones exceed the model's context of "
                f"{self.context_length()} tokens"
            )
        return prompt


def as_list(value: int | Sequence[int] | None) -> list[int]:
    """Zero, one or several ids, as generation configs write them."""
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
