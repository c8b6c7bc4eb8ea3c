import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentlab.adapters import Card, Pool, load, save
from agentlab.errors import AdapterError
from agentlab.files import sha256_file

from .helpers import card, random_lora


def put(pool: Pool, adapter_id: str, fitness: float | None = 0.5, seed: int = 1, **changes: object) -> Card:
    save(random_lora(seed), pool.path(adapter_id))
    digest = sha256_file(pool.path(adapter_id) / "adapter_model.safetensors")
    made = card(adapter_id, fitness, **({"weights_sha256": digest} | changes))
    pool.add(made)
    return made


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return Pool(tmp_path / "adapters", size=2, base_sha256="b" * 64)


def test_an_empty_pool_writes_nothing(pool: Pool) -> None:
    assert (pool.cards(), pool.members(), pool.best("toolcalls"), pool.prune(), pool.problems()) == (
        [],
        [],
        None,
        [],
        [],
    )
    assert not pool.folder.exists()


def test_card_round_trip_and_order(pool: Pool) -> None:
    first = put(pool, "g000-c00", 0.2)
    put(pool, "g000-c01", 0.9, suite="extraction")
    put(pool, "g000-c02", 0.9, parent_ids=["g000-c00", "g000-c01"], merge_weights=[0.3, 0.7])
    put(pool, "g000-c03", None)
    assert pool.card("g000-c00") == first
    assert [one.adapter_id for one in pool.cards()] == ["g000-c00", "g000-c01", "g000-c02", "g000-c03"]
    assert [one.adapter_id for one in pool.members()] == ["g000-c01", "g000-c02", "g000-c00", "g000-c03"]
    best = pool.best("toolcalls")
    assert best is not None
    assert (best.adapter_id, best.parent_ids, best.merge_weights) == ("g000-c02", ["g000-c00", "g000-c01"], [0.3, 0.7])
    assert pool.best("arithmetic") is None


def test_unknown_and_hostile_ids(pool: Pool, tmp_path: Path) -> None:
    put(pool, "g000-c00")
    with pytest.raises(AdapterError, match="there are: g000-c00"):
        pool.card("g000-c09")
    (tmp_path / "card.json").write_text("{}")
    for bad in ("..", "../x", "/etc", "", "a/b", ".hidden", "a\n", "x" * 65):
        with pytest.raises(AdapterError, match="adapter id"):
            pool.card(bad)
        with pytest.raises(AdapterError, match="adapter id"):
            pool.cull(bad)


def test_a_broken_card_is_named_and_does_not_hide_the_others(pool: Pool) -> None:
    put(pool, "g000-c00")
    put(pool, "g000-c01")
    path = pool.path("g000-c01") / "card.json"
    for text in ("", "{", "[]", '{"adapter_id": "g000-c01"}', path.read_text().replace("g000-c01", "g000-c07", 1)):
        path.write_text(text)
        with pytest.raises(AdapterError, match=r"g000-c01/card\.json") as error:
            pool.cards()
        assert "\n" not in str(error.value)
        assert [one.adapter_id for one in pool.cards(strict=False)] == ["g000-c00"]
        assert len(pool.problems()) == 1


def test_unfinished_folders_are_no_adapters(pool: Pool) -> None:
    put(pool, "g000-c00")
    save(random_lora(1), pool.path("g000-c01"))
    (pool.folder / ".g000-c02.1-00000000.tmp").mkdir()
    assert [one.adapter_id for one in pool.cards()] == ["g000-c00"]


def test_verify(pool: Pool) -> None:
    put(pool, "g000-c00")
    folder = pool.verify("g000-c00")
    assert load(folder).rank == 4
    weights = folder / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(AdapterError, match="sha256 differs"):
        pool.verify("g000-c00")
    assert len(pool.problems()) == 1
    weights.unlink()
    with pytest.raises(AdapterError, match="missing"):
        pool.verify("g000-c00")
    put(pool, "g000-c01", base_sha256="c" * 64)
    with pytest.raises(AdapterError, match="another base model"):
        pool.verify("g000-c01")
    assert Pool(pool.folder).verify("g000-c01").is_dir()
    pool.cull("g000-c01")
    with pytest.raises(AdapterError, match="was culled"):
        pool.verify("g000-c01")


def test_cull_keeps_the_card_and_can_be_repeated(pool: Pool) -> None:
    before = put(pool, "g000-c00", parent_ids=["g000-c01"])
    for _ in range(2):
        pool.cull("g000-c00")
        assert pool.card("g000-c00") == before.model_copy(update={"state": "culled", "weights": None})
        assert [path.name for path in pool.path("g000-c00").iterdir()] == ["card.json"]
        assert pool.members() == []


def test_cull_survives_a_kill_between_its_halves(pool: Pool) -> None:
    put(pool, "g000-c00")
    pool._mark_culled("g000-c00")
    draft = pool.path("g000-c00") / ".card.json.x1.tmp"
    draft.write_text("{")
    weights = pool.path("g000-c00") / "adapter_model.safetensors"
    assert weights.exists()
    assert pool.members() == []
    with pytest.raises(AdapterError, match="culled"):
        pool.verify("g000-c00")
    pool.prune()
    assert not weights.exists()
    assert not draft.exists()
    assert pool.card("g000-c00").state == "culled"


def test_sweep_deletes_what_dead_processes_left_only(pool: Pool) -> None:
    put(pool, "g000-c00")
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    dead = pool.folder / f".g000-c01.{done.pid}-0123abcd.tmp"
    alive = pool.folder / f".g000-c02.{os.getpid()}-0123abcd.tmp"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"x")
    pool.sweep()
    assert (dead.exists(), alive.exists()) == (False, True)
    assert pool.verify("g000-c00")


def test_prune(pool: Pool) -> None:
    for index, fitness in enumerate([0.1, 0.9, 0.5, 0.7]):
        put(pool, f"g000-c0{index}", fitness)
    assert pool.prune(keep=3) == ["g000-c00"]
    assert pool.prune(protect={"g000-c02"}) == ["g000-c03"]
    assert [one.adapter_id for one in pool.members()] == ["g000-c01", "g000-c02"]
    assert pool.prune(protect={"g000-c02"}) == []
    assert pool.prune(keep=0, protect={"g000-c02"}) == ["g000-c01"]
    assert len(pool.cards()) == 4


def test_add_again_keeps_the_uses(pool: Pool) -> None:
    made = put(pool, "g000-c00")
    assert [pool.count_use("g000-c00"), pool.count_use("g000-c00")] == [1, 2]
    pool.add(made.model_copy(update={"performance_metrics": {"fitness": 0.8}}))
    assert pool.card("g000-c00").usage_count == 2
    assert pool.card("g000-c00").performance_metrics == {"fitness": 0.8}


def _use(folder: Path, times: int) -> None:
    pool = Pool(folder)
    for _ in range(times):
        pool.count_use("g000-c00")


def test_four_processes_lose_no_use(pool: Pool) -> None:
    put(pool, "g000-c00")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_use, args=(pool.folder, 25)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert pool.card("g000-c00").usage_count == 100


def test_nan_metrics_are_refused_and_the_old_card_stays(pool: Pool) -> None:
    made = put(pool, "g000-c00")
    with pytest.raises(AdapterError, match="NaN"):
        pool.add(made.model_copy(update={"performance_metrics": {"fitness": float("nan")}}))
    assert pool.card("g000-c00") == made


def test_cards_are_readable_json_with_a_path_relative_to_the_pool(pool: Pool) -> None:
    put(pool, "g000-c00")
    values = json.loads((pool.path("g000-c00") / "card.json").read_text())
    assert (pool.folder / values["weights"]).is_file()


def test_importing_the_room_imports_no_torch() -> None:
    code = "import sys, agentlab.adapters; print(sorted({'torch', 'peft', 'safetensors'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
