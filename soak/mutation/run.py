"""Try the tests by breaking the code: every mutant of a room is run through the tests that come by its line.

    python soak/mutation/run.py formats/writing --minutes 10

Nothing is imported twice: the parent holds torch, transformers and the like and nothing of ours, and a mutant is a
child of it in which one module has another source. So one costs a second or two, and no file is touched. First the
tests are recorded, a file at a time: how long each takes, and which lines it comes by. A mutant is then given those
tests that come by its line, quickest first, as many as fit into some seconds, until one fails. What a test does in a
process of its own is not seen: such a process has the code as it is.

Mutants are taken in turns from the modules, in an order drawn once, so that a bound on time leaves a fair sample; what
was tried is kept in build/mutation, and is not tried again until its module changes. `tests.json` says which test files
concern which modules, `equivalent.json` which mutants change nothing that anybody is promised, and why.

mutmut 3 and cosmic-ray were looked at: docs/testing.md says why they are not used.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from children import MOST_MINUTES, ROOT, STATE, fork, record, run_tests
from mutants import Mutant, mutants

HERE = Path(__file__).parent
_ALWAYS = ("pytest", "numpy", "torch", "transformers", "safetensors.torch", "huggingface_hub", "click", "hypothesis")
_SLOWER = 4  # than when they were recorded, in seconds of the processor: then it is an endless loop
_KILLED, _LEFT = "killed", "left"
_NOTHING_RUN = 5  # what pytest exits with then


def main() -> None:
    """Run the mutants of what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="modules or folders, such as formats or kernels/cpu/linear.py")
    parser.add_argument("--minutes", type=float, default=10, help="begin no further mutant after so many")
    parser.add_argument("--sample", type=int, default=10**9, help="at most so many mutants of each module")
    parser.add_argument("--seconds", type=float, default=10, help="of tests for each mutant, as they were recorded")
    parser.add_argument("--tests", nargs="+", help="these test files, and not those that tests.json names")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at the same time")
    parser.add_argument("--again", action="store_true", help="try those once more that were left")
    parser.add_argument("--show", action="store_true", help="only what is known: the table and those left")
    arguments = parser.parse_args()
    STATE.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / ".typing"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    modules = sorted(path for name in arguments.paths for path in _modules(name))
    everything = {path: _drawn(mutants(ROOT, path))[: arguments.sample] for path in modules}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if not arguments.show:
        _try(everything, arguments)
    report(everything)


def _modules(name: str) -> Iterator[str]:
    path = ROOT / name
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        yield file.relative_to(ROOT).as_posix()


def _drawn(found: list[Mutant]) -> list[Mutant]:
    random.Random(24).shuffle(found)
    return found


def _tests_for(path: str) -> list[str]:
    """Return the test files that concern a module: those of the longest entry that it begins with."""
    table = json.loads((HERE / "tests.json").read_text())
    return list(table[max((prefix for prefix in table if path.startswith(prefix)), key=len)])


def _try(everything: dict[str, list[Mutant]], arguments: argparse.Namespace) -> None:
    for name in _ALWAYS:
        importlib.import_module(name)
    concerned = {path: arguments.tests or _tests_for(path) for path in everything}
    files = {name: None for names in concerned.values() for name in names}
    recorded = {name: record(name) for name in files}
    for name in {name: None for one in recorded.values() for name in one["imported"]}:
        if name.partition(".")[0] in {known.partition(".")[0] for known in _ALWAYS} | {"triton", "tokenizers"}:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    queue = [one for row in zip_longest(*everything.values()) for one in row if one is not None]
    queue = [one for one in queue if _result(one) is None or (arguments.again and _result(one) != _KILLED)]
    end = time.monotonic() + 60 * arguments.minutes
    running: dict[int, tuple[Mutant, list[str], dict[str, float]]] = {}
    print(f"{len(queue)} mutants of {len(everything)} modules to be tried", flush=True)
    while queue or running:
        while queue and len(running) < arguments.jobs and time.monotonic() < end:
            mutant = queue.pop(0)
            tests = _tests_of(mutant, {name: recorded[name]["tests"] for name in concerned[mutant.path]})
            chosen = _quickest(tests, arguments.seconds)
            if not chosen:
                _keep(mutant, _LEFT, "no test comes by")
                continue
            limit = 10 + _SLOWER * sum(tests[name] for name in chosen)
            running[fork(lambda mutant=mutant, chosen=chosen: run_tests(mutant, chosen), limit)] = mutant, chosen, tests
        if not running:
            break
        child, status = os.wait()
        if child in running:
            mutant, chosen, tests = running.pop(child)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(status)
            if code == -signal.SIGALRM:
                print(f"no answer in {MOST_MINUTES} minutes: {mutant.key}", flush=True)
                continue
            if code == _NOTHING_RUN:
                print(f"no test of those chosen is there any more: {mutant.key}", flush=True)
                continue
            how = f"of {len(tests)} tests {len(chosen)} were run" if code == 0 else f"exit {code}"
            _keep(mutant, _LEFT if code == 0 else _KILLED, how)


def _tests_of(mutant: Mutant, recorded: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the tests that come by a mutant's lines, or all where it is in no function: name -> seconds."""
    wanted, found = set(range(mutant.line, mutant.last_line + 1)), {}
    for tests in recorded.values():
        for name, test in tests.items():
            # What is no function's runs when it is imported, which is recorded of one test only.
            if not mutant.in_function or wanted.intersection(test["lines"].get(mutant.path, ())):
                found[name] = test["seconds"]
    return found


def _quickest(tests: dict[str, float], seconds: float) -> list[str]:
    chosen: list[str] = []
    for name in sorted(tests, key=tests.__getitem__):
        seconds -= tests[name]
        if chosen and seconds < 0:
            break
        chosen.append(name)
    return chosen


def _kept(path: str) -> Path:
    return STATE / f"{path.replace('/', '.')}.jsonl"


_known: dict[str, dict[str, Any]] = {}


def _results(path: str) -> dict[str, Any]:
    """Return what is known of a module's mutants, by digest; the last line counts."""
    if path not in _known:
        kept = _kept(path)
        lines = kept.read_text().splitlines() if kept.exists() else []
        _known[path] = {entry["digest"]: entry for entry in map(json.loads, lines)}
    return _known[path]


def _result(mutant: Mutant) -> str | None:
    entry = _results(mutant.path).get(mutant.digest)
    return entry["result"] if entry else None


def _keep(mutant: Mutant, result: str, how: str) -> None:
    entry = {"digest": mutant.digest, "result": result, "how": how, "line": mutant.line, "key": mutant.key}
    _results(mutant.path)[mutant.digest] = entry
    with _kept(mutant.path).open("a") as file:
        file.write(json.dumps(entry) + "\n")
    print(f"{result:6} {mutant.path}:{mutant.line}: {mutant.after}  ({how})", flush=True)


def report(everything: dict[str, list[Mutant]]) -> None:
    """Print the mutants left, and a table of all modules."""
    equivalent = json.loads((HERE / "equivalent.json").read_text())
    total: Counter[str] = Counter()
    rows = []
    for path, found in everything.items():
        count: Counter[str] = Counter(all=len(found))
        for mutant in sorted(found, key=lambda one: one.line):
            result = _result(mutant)
            if result == _LEFT and mutant.key in equivalent:
                result = "equivalent"
            if result is not None:
                count.update(["tried", result])
            if result == _LEFT:
                print(f"left: {mutant.key}   [{mutant.line}; {_results(path)[mutant.digest]['how']}]")
        rows.append((path, count))
        total.update(count)
    for path, count in [*rows, ("together", total)]:
        counts = [count[what] for what in ("all", "tried", _KILLED, "equivalent", _LEFT)]
        print("|", path, *(f"| {number}" for number in counts), "|")


if __name__ == "__main__":
    main()
