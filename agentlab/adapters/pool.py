"""The adapters of one run on disk: `<run>/adapters/<id>/` holds a card and, until it is culled, a PEFT folder."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from agentlab.adapters import folders
from agentlab.adapters.card import CARD_FILE, CULLED, Card, check_id, read_card, write_card
from agentlab.adapters.export import export_adapter
from agentlab.adapters.lora import WEIGHTS_FILE
from agentlab.adapters.peft_config import CONFIG_FILE
from agentlab.errors import AdapterError
from agentlab.files import disk_errors, sha256_file, sync_folder


class Pool:
    """The adapters kept, and the cards of all that ever were. The disk is its only state; several processes may use it.

    `size` is how many weights are kept by `prune`; `base_sha256` names the base model that adapters must belong to,
    "" where that is not known.
    """

    def __init__(self, folder: Path, size: int = 10, base_sha256: str = "") -> None:
        self.folder = Path(folder)
        self.size = size
        self.base_sha256 = base_sha256

    def path(self, adapter_id: str) -> Path:
        """Where this adapter's PEFT folder is, or would be saved."""
        return self.folder / check_id(adapter_id)

    def add(self, card: Card) -> None:
        """Write or rewrite a card; the uses counted so far are kept. Weights are saved before it, into `path(id)`."""
        path = self.path(card.adapter_id) / CARD_FILE
        with self._locked():
            if path.exists():
                known = read_card(path)
                card = card.model_copy(update={"usage_count": max(card.usage_count, known.usage_count)})
            write_card(path, card)

    def card(self, adapter_id: str) -> Card:
        """The card of `adapter_id`, also of a culled one; raises AdapterError that lists the known ids."""
        path = self.path(adapter_id) / CARD_FILE
        if not path.exists():
            known = ", ".join(file.parent.name for file in self._files()) or "none yet"
            raise AdapterError(f"no adapter {adapter_id} in {self.folder}; there are: {known}")
        return read_card(path)

    def cards(self, *, strict: bool = True) -> list[Card]:
        """All cards by id, also those of culled adapters. A damaged one raises AdapterError, or is left out
        without `strict` and found by `problems`. Folders without a card are unfinished and no adapters yet.
        """
        cards = []
        for file in self._files():
            try:
                cards.append(read_card(file))
            except AdapterError:
                if strict:
                    raise
        return cards

    def problems(self) -> list[str]:
        """One sentence for each adapter that is damaged or foreign; reads every weight file once."""
        found = []
        for file in self._files():
            try:
                if read_card(file).weights is not None:
                    self.verify(file.parent.name)
            except AdapterError as error:
                found.append(str(error))
        return found

    def members(self, *, strict: bool = True) -> list[Card]:
        """The cards of the adapters that still have weights, best fitness first, ties by id. strict: as in `cards`."""
        alive = [card for card in self.cards(strict=strict) if card.weights is not None and card.state != CULLED]
        return sorted(alive, key=lambda card: (-card.fitness, card.adapter_id))

    def best(self, suite: str) -> Card | None:
        """The fittest member measured on `suite`, if there is one."""
        return next(
            (card for card in self.members() if card.suite == suite and "fitness" in card.performance_metrics), None
        )

    def count_use(self, adapter_id: str) -> int:
        """Count one use, safe across processes; the new count comes out."""
        with self._locked():
            card = self.card(adapter_id)
            card = card.model_copy(update={"usage_count": card.usage_count + 1})
            write_card(self.path(adapter_id) / CARD_FILE, card)
        return card.usage_count

    def verify(self, adapter_id: str) -> Path:
        """The adapter's folder, once its files are found to be those of the card and of this base model."""
        card, folder = self.card(adapter_id), self.path(adapter_id)
        if card.weights is None or card.state == CULLED:
            raise AdapterError(f"{adapter_id} was culled and its weights are gone; choose one of the pool's members")
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise AdapterError(f"{folder / name} is missing; restore it from a copy or cull {adapter_id}")
        if card.weights_sha256 is not None and sha256_file(folder / WEIGHTS_FILE) != card.weights_sha256:
            raise AdapterError(
                f"{folder / WEIGHTS_FILE} is not what the card of {adapter_id} describes (sha256 differs); "
                f"restore it from a copy or cull {adapter_id}"
            )
        if self.base_sha256 and card.base_sha256 != self.base_sha256:
            raise AdapterError(
                f"{adapter_id} was trained on another base model ({card.base_model}, sha256 {card.base_sha256[:12]}…) "
                f"than the one in use (sha256 {self.base_sha256[:12]}…); use that model or another adapter"
            )
        return folder

    def cull(self, adapter_id: str) -> None:
        """Delete the weights and keep the card. Doing it again, or after a kill in between, ends in the same."""
        with self._locked():
            self._mark_culled(adapter_id)
            self._delete_weights(adapter_id)

    def prune(self, keep: int | None = None, protect: set[str] | None = None) -> list[str]:
        """Cull all but the best `keep` members (default: the pool's size) and return the culled ids, best first.

        The adapters in `protect` stay and count among the kept ones. Also finishes what a kill interrupted.
        """
        self.sweep()
        protect = protect or set()
        members = self.members()
        room = (self.size if keep is None else keep) - sum(card.adapter_id in protect for card in members)
        others = [card.adapter_id for card in members if card.adapter_id not in protect]
        culled = others[max(0, room) :]
        for adapter_id in culled:
            self.cull(adapter_id)
        return culled

    def sweep(self) -> None:
        """Delete what killed processes left: temporary folders, and the weights of adapters already marked culled."""
        if not self.folder.is_dir():
            return
        folders.sweep(self.folder)
        with self._locked():
            for card in self.cards(strict=False):
                if card.state == CULLED:
                    self._delete_weights(card.adapter_id)

    def export(self, adapter_id: str, out: Path, merged_into: Path | None = None) -> Path:
        """Copy the adapter to the new folder `out` as a plain PEFT folder; with `merged_into`, the folder of the base
        model, write the merged model instead. Raises AdapterError if `out` exists or the adapter fails `verify`.
        """
        return export_adapter(self.card(adapter_id), self.verify(adapter_id), Path(out), merged_into)

    def _files(self) -> list[Path]:
        return sorted(file for file in self.folder.glob(f"*/{CARD_FILE}") if not file.parent.name.startswith("."))

    # The card first: a kill in between leaves a culled adapter with some bytes, never a member without weights.
    def _mark_culled(self, adapter_id: str) -> None:
        card = self.card(adapter_id)
        if card.state != CULLED or card.weights is not None:
            card = card.model_copy(update={"state": CULLED, "weights": None})
            write_card(self.path(adapter_id) / CARD_FILE, card)

    def _delete_weights(self, adapter_id: str) -> None:
        folder = self.path(adapter_id)
        # Card drafts can only be dead here: every card is written under the lock.
        stale = [folder / WEIGHTS_FILE, folder / CONFIG_FILE, *folder.glob(f".{CARD_FILE}.*.tmp")]
        with disk_errors(folder):
            for path in stale:
                path.unlink(missing_ok=True)
            sync_folder(folder)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
