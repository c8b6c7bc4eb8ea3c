"""What many memories at once need: ids, words found once, no search for cycles meanwhile."""

import gc
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentlab.memory.bulk import no_collections
from agentlab.memory.records import MemoryItem
from agentlab.memory.words import signature, signature_and_terms, terms
from agentlab.memory.writing import new_id, replaced


def test_ids_are_distinct_and_sort_by_time():
    before = time.time()
    made = [new_id() for _ in range(2_000)]
    assert len(set(made)) == len(made)
    assert all(len(one) == 18 and one.startswith("m-") for one in made)
    times = [(int(one[2:], 32) >> 32) / 1000 for one in made]  # the upper 48 of 80 bits, base 32
    assert times == sorted(times)
    assert before - 0.001 <= times[0] <= times[-1] <= time.time()


@given(st.text(max_size=60))
def test_words_found_once_say_the_same(text):
    assert signature_and_terms(text) == (signature(text), terms(text))


def test_a_changed_copy_leaves_the_memory_alone():
    item = MemoryItem(memory_id="a", content="x", tags=["t"])
    changed = replaced(item, importance=0.25, tags=["u"])
    assert changed == MemoryItem(memory_id="a", content="x", tags=["u"], importance=0.25)
    assert (item.importance, item.tags) == (0.5, ["t"])


def test_collections_go_on_whatever_happened():
    on = []

    @no_collections()
    @no_collections()
    def fails():
        on.append(gc.isenabled())
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert (on, gc.isenabled()) == ([False], True)
    gc.disable()
    try:
        with no_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
