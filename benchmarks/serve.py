"""Many streaming clients at once while the champion changes: requests, failures and latency of `agentlab serve`.

A real server process (queue, token, metrics) with a run of a tiny model; the champion changes by what an evolution
writes when it promotes. Every stream has to be complete: the role first, a finish reason, the last chunk's adapter,
[DONE]. Prints a table and one JSON line.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))


@contextlib.contextmanager
def server(lab, options):
    """`agentlab serve` in a process of its own: (url, token)."""
    token = "the-token-of-a-benchmark"
    sets = [word for override in lab.overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "agentlab", "serve", str(lab.experiment), *sets, "--port", "0", *options]
    environment = {**os.environ, "AGENTLAB_TOKEN": token, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"on (http://\S+)/v1", line):
                break
        else:
            raise SystemExit("".join(said))
        yield found[1], token, process
    finally:
        process.send_signal(signal.SIGTERM)
        print("".join(process.stderr), end="", file=sys.stderr)
        process.wait(60)


class Tally:
    """What the clients saw."""

    def __init__(self):
        self.latencies_s = []
        self.first_s = []
        self.failures = collections.Counter()
        self.adapters = collections.Counter()


async def client(http, url, number, end, tokens, tally):
    """One client: a stream after another until the time is over."""
    turn = 0
    while time.monotonic() < end:
        turn += 1
        body = {
            "model": "agentlab", "stream": True, "max_tokens": tokens,
            "messages": [{"role": "user", "content": f"Question {turn} of client {number}?"}],
        }  # fmt: skip
        started = time.monotonic()
        try:
            adapter = await stream(http, url, body, started, tally)
        except Exception as error:  # whatever goes wrong is a failed request
            tally.failures[f"{type(error).__name__}: {str(error)[:80]}"] += 1
            await asyncio.sleep(0.1)
            continue
        tally.latencies_s.append(time.monotonic() - started)
        tally.adapters[adapter] += 1


async def stream(http, url, body, started, tally):
    """Read one stream to its end and check it; the adapter that answered."""
    first, finish, adapter, done = None, None, None, False
    async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}")
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                done = True
                break
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            choice = chunk["choices"][0]
            if first is None:
                first = choice["delta"]
            elif choice["delta"].get("content") and finish is None:
                tally.first_s.append(time.monotonic() - started)
                finish = ""
            if choice["finish_reason"]:
                finish, adapter = choice["finish_reason"], chunk["agentlab"]["adapter"]
    if first != {"role": "assistant", "content": ""} or finish not in ("stop", "length") or not adapter or not done:
        raise RuntimeError("an incomplete stream")
    return adapter


async def load(url, token, lab, options, tally):
    import httpx
    from support import promote

    started = time.monotonic()
    end = started + options.seconds
    champions = [lab.run.champion()]
    pool = lab.run.results()[-1].pool
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        headers={"Authorization": f"Bearer {token}"}, timeout=httpx.Timeout(300), limits=limits
    ) as http:
        clients = [
            asyncio.create_task(client(http, url, number, end, options.tokens, tally))
            for number in range(options.clients)
        ]
        for change in range(options.changes):
            await asyncio.sleep(
                max(0.0, started + options.seconds * (change + 1) / (options.changes + 1) - time.monotonic())
            )
            champions.append(next(name for name in pool if name not in champions))
            promote(lab.run, champions[-1])
        await asyncio.gather(*clients)
        seconds = time.monotonic() - started
        series = (await http.get(f"{url}/metrics")).text
    return champions, seconds, series


def main():
    parser = argparse.ArgumentParser(description=f"{__doc__} Ends in one JSON line.")
    parser.add_argument("--clients", type=int, default=200, help="Concurrent clients. Default: 200.")
    parser.add_argument("--seconds", type=float, default=60, help="How long they ask. Default: 60.")
    parser.add_argument("--changes", type=int, default=2, help="Changes of the champion, 2 at most. Default: 2.")
    parser.add_argument("--tokens", type=int, default=12, help="New tokens of an answer. Default: 12.")
    parser.add_argument("--memory", action="store_true", help="Also recall from a memory.")
    parser.add_argument("--model", type=Path, help="Folder of a model. Default: a random one of two layers.")
    options = parser.parse_args()

    from support import evolved_lab, promote, write_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        print("evolving a tiny run …", file=sys.stderr)
        model = options.model or write_tiny_model(Path(folder) / "model")
        (Path(folder) / "project").mkdir()
        lab = evolved_lab(Path(folder) / "project", model)
        promote(lab.run, lab.run.results()[-1].pool[0])
        tally = Tally()
        with server(lab, [] if options.memory else ["--no-memory"]) as (url, token, process):
            champions, seconds, series = asyncio.run(load(url, token, lab, options, tally))
        swaps = float(re.search(r"^agentlab_champion_swaps_total (\S+)", series, re.M)[1])
        refused = dict(re.findall(r'responses_total{code="([45]\d\d)".*} (\S+)', series))
        result = {
            "benchmark": "serve",
            "clients": options.clients,
            "seconds": round(seconds, 1),
            "requests": len(tally.latencies_s) + tally.failures.total(),
            "failed": tally.failures.total(),
            "failures": dict(tally.failures.most_common(5)),
            "refused": refused,
            "requests_per_s": round(len(tally.latencies_s) / seconds, 1),
            "latency_p50_s": round(statistics.median(tally.latencies_s), 3),
            "latency_p95_s": round(statistics.quantiles(tally.latencies_s, n=20)[-1], 3),
            "first_token_p50_s": round(statistics.median(tally.first_s), 3),
            "champion_changes": options.changes,
            "champion_swaps": swaps,
            "answers_by_champion": {name: tally.adapters[name] for name in champions},
            "exit_code": process.returncode,
        }
    for name, value in result.items():
        print(f"{name:<22} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
