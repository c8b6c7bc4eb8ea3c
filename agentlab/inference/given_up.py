"""What the models of a chain have given up for lack of memory, and when they take it back. Acts on nothing itself."""

import dataclasses
from typing import Literal, cast

from agentlab.config import RungName
from agentlab.hardware import recovery
from agentlab.hardware.recovery import Action
from agentlab.inference.contract import Engine

_LASTING = ("shrink_context", "lower_rung")  # what outlives the engine that did it


@dataclasses.dataclass
class Step:
    """A step that was taken for lack of memory and not undone yet; `position` says of which model.

    origin: of the model that gave way to the CPU. engine: on which it acts, None until that is loaded.
    at_opening: nothing was changed in place, and the model that is opened without this step may be on another engine.
    reason: why the model is not tried meanwhile, where it is given up.
    """

    action: Action
    position: int
    engine: Engine | None = None
    origin: int = -1
    at_opening: bool = False
    reason: str = ""


class GivenUp:
    """The steps that are in force, oldest first, and what decides on undoing them: the last one first, when it is due.

    What they mean for a model, its rung, its place, whether it is tried at all, follows from them alone. A model on the
    CPU begins anew there; what it had given up on the card waits for it.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.asked_tokens = 0  # of the largest request that memory did not suffice for
        self._memory: Literal["untried", "sufficed", "lacked"] = "untried"  # in this answer
        self._calm_answers = 0  # in a row, in which it sufficed
        self._undone: set[tuple[int, str]] = set()  # (position, action) of steps that were undone
        self._relapses: dict[tuple[int, str], int] = {}  # and how often they had to be taken again

    # -- what follows from the steps -----------------------------------------------------------------------------------

    def rung(self, position: int) -> RungName | None:
        """At which a model is opened where it is now; None: its usual one."""
        lower = [one.action.target for one in self._of(position) if one.action.kind == "lower_rung"]
        return cast(RungName, lower[-1]) if lower else None

    @property
    def on_cpu(self) -> int | None:
        """Which model was moved there."""
        return next((one.position for one in self.steps if one.action.kind == "cpu"), None)

    def reason(self, position: int) -> str:
        """Why a model is not tried for lack of memory; "" where it is."""
        if position == self.on_cpu:
            return ""
        found = [one.reason for one in self.steps if one.position == position and one.action.kind == "smaller_model"]
        found += [one.reason for one in self.steps if one.origin == position]
        return found[-1] if found else ""

    def whole_context(self, engine: Engine) -> int:
        """Most tokens that a loaded model reads while its context is not shrunk."""
        shrunk = [one.action for one in self.steps if one.engine is engine and one.action.kind == "shrink_context"]
        return int(shrunk[0].source) if shrunk else engine.context_length()

    def _of(self, position: int) -> list[Step]:
        """The steps of a model where it is now: on the CPU, those since it came there."""
        since = self._moved() + 1 if position == self.on_cpu else 0
        return [one for one in self.steps[since:] if one.position == position]

    def _moved(self) -> int:
        """Where the step to the CPU is; -1 where there is none."""
        return next((at for at, one in enumerate(self.steps) if one.action.kind == "cpu"), -1)

    # -- taking steps --------------------------------------------------------------------------------------------------

    def take(self, step: Step) -> None:
        """Note a step that was taken."""
        self.steps.append(step)
        mark = (step.position, step.action.kind)
        if mark in self._undone:
            self._undone.discard(mark)
            self._relapses[mark] = self._relapses.get(mark, 0) + 1

    def last_given_up(self) -> Step | None:
        """The last model that was left for lack of memory; None where none was."""
        return next((one for one in reversed(self.steps) if one.action.kind == "smaller_model"), None)

    def move_to_cpu(self, step: Step) -> None:
        """Note that a model goes to the CPU, for one that is left no more on its own account."""
        given = self.last_given_up()
        if given is not None and given.position == step.origin:
            self.steps.remove(given)
        self.take(step)

    def leave_cpu(self) -> None:
        """Note that it does not do there either: the model that gave way to it is left as before."""
        at = self._moved()
        moved = self.steps[at]
        self.steps = self._without_cpu(at)
        action = dataclasses.replace(moved.action, kind="smaller_model")
        self.take(Step(action, moved.origin, reason=moved.reason))

    def _without_cpu(self, at: int) -> list[Step]:
        place = self.steps[at].position
        return self.steps[:at] + [one for one in self.steps[at + 1 :] if one.position != place]

    def forget(self, position: int) -> None:
        """A model is not tried again for other reasons: what it had given up need not be taken back."""
        self.steps = [one for one in self.steps if one.position != position or one.action.kind not in _LASTING]

    # -- engines that come and go --------------------------------------------------------------------------------------

    def opened(self, position: int, engine: Engine) -> list[Action]:
        """The model is loaded, at its rung; what is still to be done on its engine to have it as it was."""
        todo = []
        for one in self._of(position):
            if one.engine is None and one.action.kind in _LASTING:
                one.engine = engine
                if one.action.kind == "shrink_context":
                    todo.append(one.action)
        return todo

    def closed(self, engine: Engine, lasting: bool) -> None:
        """An engine is freed. lasting: its model can be opened again with the context and at the rung that it had."""
        kept = []
        for one in self.steps:
            if one.engine is engine:
                if not lasting or one.action.kind not in _LASTING:
                    continue
                one.engine = None
            kept.append(one)
        self.steps = kept

    # -- one answer after another --------------------------------------------------------------------------------------

    def tried(self) -> None:
        """A model is asked: its memory suffices until it is known to lack."""
        if self._memory == "untried":
            self._memory = "sufficed"

    def lacked(self, asked_tokens: int) -> None:
        """Memory did not suffice for a request of so many tokens; 0 where it is not known, as at loading."""
        self._memory, self._calm_answers = "lacked", 0
        self.asked_tokens = max(self.asked_tokens, asked_tokens)

    def begin_answer(self) -> None:
        """Count the last answer as calm if it was one; harmless while nobody asks."""
        self._calm_answers += self._memory == "sufficed"
        self._memory = "untried"

    def undo(self, free_bytes: int, nothing_left: bool) -> Step | None:
        """The step to take back now, which is in force no more; None where none is due.

        Of one on the CPU it is that it was moved there: what it gave up there is void then, and it is the card's memory
        that is known to have returned. nothing_left: no model is left to answer.
        """
        if not self.steps:
            return None
        at = self._moved()  # -1, the last one, where none was moved
        last = self.steps[at]
        mark = (last.position, last.action.kind)
        if not recovery.may_undo(
            last.action, free_bytes, self._calm_answers, self._relapses.get(mark, 0), nothing_left
        ):
            return None
        self.steps = self.steps[:-1] if at < 0 else self._without_cpu(at)
        if not nothing_left:
            self._undone.add(mark)
        self._calm_answers = 0
        return last

    def not_undone(self, step: Step) -> None:
        """Taking it back has failed: the model is opened again as it was."""
        if step.action.kind in _LASTING:
            self.take(Step(step.action, step.position, at_opening=step.at_opening))
