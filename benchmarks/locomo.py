"""How often the memory recalls a turn that holds the evidence for a question: LoCoMo, categories 1 to 4.

Each conversation is remembered turn by turn in a memory of its own ("speaker: text", with what a shared picture
shows); a question is found at k when any of its evidence turns is among the first k. Peers in the same run: MiniLM's
vectors compared by FAISS, FTS5's BM25 with its porter tokenizer, and the reciprocal-rank fusion of the two.
The data is CC BY-NC 4.0, for measuring only. Ends in one JSON line.
"""

import argparse
import datetime
import json
import os
import re
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import Any

KS = (5, 10, 20)
DEPTH = 200  # of each peer's ranking, for the fusion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("AGENTLAB_DATA"), help="folder with locomo/*.json")
    parser.add_argument("--file", default="locomo5.json", help="which conversations (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only so many questions per conversation")
    options = parser.parse_args()
    source = Path(options.data or ".") / "locomo" / options.file
    if not source.is_file():
        print(f"skipped: no {source}; give the folder that holds locomo/ with --data or in AGENTLAB_DATA")
        print(json.dumps({"benchmark": "locomo", "skipped": True}))
        return
    from agentlab.memory.embedding import SentenceEmbedder

    embedder = SentenceEmbedder()
    names = ("memory", "vectors", "words", "fusion")
    found: dict[str, list[list[bool]]] = {name: [] for name in names}
    rows: list[tuple[int, int]] = []  # (conversation, category) of each question
    seconds = 0.0
    conversations = json.loads(source.read_text())
    for number, conversation in enumerate(conversations):
        turns = read_turns(conversation["conversation"])
        questions = read_questions(conversation["qa"], {turn["id"] for turn in turns})[: options.limit]
        rankings, took = measure(turns, [question for question, _, _ in questions], embedder)
        seconds += took
        for name in names:
            for (_, evidence, _), ranking in zip(questions, rankings[name], strict=True):
                found[name].append([any(turn in evidence for turn in ranking[:k]) for k in KS])
        rows += [(number, category) for _, _, category in questions]
        print(f"{conversation['sample_id']}: {len(turns)} turns, {len(questions)} questions", flush=True)
    print(f"{'':24}{'first 5':>9}{'first 10':>10}{'first 20':>10}")
    results = {}
    for name in names:
        results[name] = percent(found[name])
        print(f"{name:24}" + "".join(f"{value:>9.1f} " for value in results[name]))
    for what, key in (("conversation", 0), ("category", 1)):
        for value in sorted({row[key] for row in rows}):
            part = [hit for hit, row in zip(found["memory"], rows, strict=True) if row[key] == value]
            name = conversations[value]["sample_id"] if key == 0 else value
            print(f"{f'memory, {what} {name}':24}" + "".join(f"{v:>9.1f} " for v in percent(part)))
    print(
        json.dumps(
            {
                "benchmark": "locomo", "questions": len(rows), "k": KS,
                "recall_percent": results,
                "ratio_to_fusion": [a / (b or 1) for a, b in zip(results["memory"], results["fusion"], strict=True)],
                "bar": [57.5, 68.3, 76.1], "aim": [65, 75, 83],
                "met": all(a > b for a, b in zip(results["memory"], (57.5, 68.3, 76.1), strict=True)),
                "recall_ms_with_embedding": 1000 * seconds / max(len(rows), 1),
            }
        )
    )  # fmt: skip


def percent(hits: list[list[bool]]) -> list[float]:
    return [100 * sum(hit[i] for hit in hits) / max(len(hits), 1) for i in range(len(KS))]


def read_turns(conversation: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns in order: id, session, time, and the text that is remembered."""
    turns = []
    numbers = sorted(int(m.group(1)) for key in conversation if (m := re.fullmatch(r"session_(\d+)", key)))
    for number in numbers:
        moment = datetime.datetime.strptime(conversation[f"session_{number}_date_time"], "%I:%M %p on %d %B, %Y")
        moment = moment.replace(tzinfo=datetime.UTC)
        for turn in conversation[f"session_{number}"]:
            text = f"{turn['speaker']}: {turn['text']}"
            if turn.get("blip_caption"):
                text += f" [shares a picture: {turn['blip_caption']}]"
            turns.append(
                {"id": turn["dia_id"], "session": f"session {number}", "time": moment.timestamp(), "text": text}
            )
    return turns


def read_questions(questions: list[dict[str, Any]], known: set[str]) -> list[tuple[str, set[str], int]]:
    """(question, ids of its evidence turns, category); without those that have no answer or no evidence."""
    found = []
    for entry in questions:
        evidence = {part for text in entry["evidence"] for part in re.split(r"[;,\s]+", text)} & known
        if entry["category"] != 5 and evidence:
            found.append((entry["question"], evidence, entry["category"]))
    return found


def measure(turns, questions, embedder) -> tuple[dict[str, list[list[str]]], float]:  # type: ignore[no-untyped-def]
    """Rankings of turn ids per way and question, and the seconds that the memory's recalls took, embedding included."""
    import faiss

    from agentlab.memory import Memory, MemoryItem

    texts = [turn["text"] for turn in turns]
    items = [
        MemoryItem(memory_id="", content=turn["text"], session_id=turn["session"], created_at=turn["time"])
        for turn in turns
    ]
    with tempfile.TemporaryDirectory() as folder, Memory.open(Path(folder) / "memory.db", embedder=embedder) as memory:
        names: dict[str, list[str]] = {}
        for memory_id, turn in zip(memory.remember_many(items), turns, strict=True):
            names.setdefault(memory_id, []).append(turn["id"])
        started = time.perf_counter()
        hits = [memory.recall(question, max(KS), count=False) for question in questions]
        seconds = time.perf_counter() - started
    ours = [[turn for hit in ranking for turn in names[hit.memory_id]] for ranking in hits]

    index = faiss.IndexFlatIP(embedder.dimension)
    index.add(embedder.embed(texts))
    by_vector = index.search(embedder.embed(questions), min(DEPTH, len(turns)))[1].tolist() if questions else []
    db = sqlite3.connect(":memory:")
    db.execute("CREATE VIRTUAL TABLE t USING fts5(text, tokenize='porter unicode61')")
    db.executemany("INSERT INTO t(rowid, text) VALUES (?, ?)", enumerate(texts))
    by_words = []
    for question in questions:
        words = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", question))
        query = "SELECT rowid FROM t WHERE t MATCH ? ORDER BY rank LIMIT ?"
        by_words.append([row for (row,) in db.execute(query, (words, DEPTH))])
    fused = [fuse(one, other) for one, other in zip(by_vector, by_words, strict=True)]
    ids = [turn["id"] for turn in turns]
    return {
        "memory": ours,
        **{
            name: [[ids[row] for row in ranking] for ranking in rankings]
            for name, rankings in (("vectors", by_vector), ("words", by_words), ("fusion", fused))
        },
    }, seconds


def fuse(*rankings: list[int]) -> list[int]:
    """Reciprocal-rank fusion with its usual constant of 60 (Cormack, Clarke & Büttcher 2009)."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, row in enumerate(ranking, start=1):
            scores[row] = scores.get(row, 0.0) + 1 / (60 + rank)
    return sorted(scores, key=lambda row: -scores[row])


if __name__ == "__main__":
    main()
