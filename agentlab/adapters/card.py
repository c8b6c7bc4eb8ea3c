"""An adapter's card: where it comes from, what it scored, which bytes it is."""

import math
import re
from pathlib import Path

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from agentlab.errors import AdapterError
from agentlab.files import write_json

CARD_FILE = "card.json"
ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
CULLED = "culled"


class Card(BaseModel):
    """What stays known of an adapter, also after its weights are gone.

    `weights` is relative to the pool's folder, None once culled. `merge_weights` belong to `parent_ids`, in order.
    `state` is a candidate's state word; `suite` names the suite that `performance_metrics` were measured on.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    adapter_id: str = Field(pattern=ID_PATTERN)
    name: str
    task_domain: str
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0, allow_inf_nan=False)
    dropout: float = Field(ge=0, lt=1)
    target_modules: list[str]
    weights: str | None
    performance_metrics: dict[str, float] = {}
    generation: int = Field(ge=0)
    parent_ids: list[str] = []
    base_model: str
    base_sha256: str
    weights_sha256: str | None
    operator: str
    merge_weights: list[float] = []
    state: str
    usage_count: int = Field(0, ge=0)
    created_at_s: float
    suite: str

    @property
    def fitness(self) -> float:
        """The metric "fitness"; minus infinity while there is none."""
        value = self.performance_metrics.get("fitness", float("-inf"))
        return value if math.isfinite(value) else float("-inf")


def check_id(adapter_id: str) -> str:
    """`adapter_id` itself; raises AdapterError for one that could lead out of the pool's folder."""
    if not re.fullmatch(ID_PATTERN, adapter_id):
        raise AdapterError(f"adapter id: {adapter_id!r}; allowed: letters, digits, - and _, for example g003-c02")
    return adapter_id


def read_card(path: Path) -> Card:
    """The card in `path`; raises AdapterError that names a missing or damaged file."""
    try:
        card = Card.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise AdapterError(f"no adapter card at {path}") from None
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror or error}") from None
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise AdapterError(
            f"{path} is damaged ({where + ': ' if where else ''}{problem['msg']}); restore it from a copy"
        ) from None
    if card.adapter_id != path.parent.name:
        raise AdapterError(f"{path} is the card of {card.adapter_id}; it belongs into a folder of that name")
    return card


def write_card(path: Path, card: Card) -> None:
    """Write `card` to `path`, atomically. NaN or infinity among the metrics is refused."""
    try:
        write_json(path, card.model_dump(mode="python"))
    except ValueError:
        raise AdapterError(
            f"the metrics of {card.adapter_id} hold NaN or infinity: {card.performance_metrics}"
        ) from None
