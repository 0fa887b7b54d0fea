"""Children of a process that has imported much and nothing of ours: each runs some tests, and can do no harm.

One may have a fault in a module: the module then gets another source when it is imported. One may record what its tests
come by, line by line.
"""

import hashlib
import importlib.abc
import importlib.machinery
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mutants import Mutant

ROOT = Path(__file__).parents[2]
STATE = ROOT / "build" / "mutation"
MOST_MINUTES = 15  # on a busy machine; who takes longer has not been tried
_MEMORY_BYTES = 12 << 30
_RECORDING_SECONDS = 1200
_ROOMS = "converter", "formats", "kernels", "runtime"


def record(test_file: str) -> dict[str, Any]:
    """Return for each test of a file its seconds and the lines of ours that it comes by, as known or found anew.

    It is found anew when the file changes. Of a module that has changed since, a test that came by it counts as coming
    by all of it.
    """
    of, kept = _digest(ROOT / "tests" / test_file), STATE / f"{test_file}.json"
    if not kept.exists() or json.loads(kept.read_text())["of"] != of:
        result = kept.with_suffix(".new")
        result.unlink(missing_ok=True)
        print(f"recording {test_file}", flush=True)
        _wait(fork(lambda: _recording(test_file, result, of), _RECORDING_SECONDS))
        if not result.exists():
            raise SystemExit(f"{test_file}: cannot be recorded; run it by itself")
        result.rename(kept)
    known = dict(json.loads(kept.read_text()))
    modules = {path for test in known["tests"].values() for path in test["lines"]}
    for path in sorted(modules):
        now = _digest(ROOT / path) if (ROOT / path).exists() else None
        if now is not None and known["modules"].get(path) != now:
            lines = list(range(1, len((ROOT / path).read_text().splitlines()) + 1))
            for test in known["tests"].values():
                test["lines"] |= {path: lines} if path in test["lines"] else {}
    return known


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _recording(test_file: str, result: Path, of: str) -> int:
    import pytest

    tests: dict[str, Any] = {}
    lines: set[tuple[str, int]] = set()
    names: dict[str, str | None] = {}

    def here(filename: str) -> str | None:
        real = os.path.realpath(filename)  # of code that has no file, as graphs have, one that is not there
        inside = real.startswith(tuple(f"{ROOT}/{room}/" for room in _ROOMS)) and os.path.exists(real)
        return os.path.relpath(real, ROOT) if inside else None

    def trace(frame: Any, event: str, argument: Any) -> Any:
        filename = frame.f_code.co_filename
        name = names[filename] if filename in names else names.setdefault(filename, here(filename))
        if name is None:
            return None

        def local(frame: Any, event: str, argument: Any) -> Any:
            lines.add((name, frame.f_lineno))
            return local

        lines.add((name, frame.f_lineno))
        return local

    class Recorder:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item: Any) -> Any:
            lines.clear()
            started = time.process_time()
            threading.settrace(trace)
            sys.settrace(trace)
            try:
                return (yield)
            finally:
                sys.settrace(None)
                threading.settrace(None)
                tests[item.nodeid]["seconds"] = time.process_time() - started
                by_file: dict[str, list[int]] = {}
                for name, line in sorted(lines):
                    by_file.setdefault(name, []).append(line)
                tests[item.nodeid]["lines"] = by_file

        def pytest_runtest_logreport(self, report: Any) -> None:
            test = tests.setdefault(report.nodeid, {"passed": True})
            test["passed"] = test["passed"] and report.outcome == "passed"

    _pytest([test_file], [Recorder()])
    ours = ("llmint8", "test", "conftest", "mutants", "__main__", "fake_hub", "spec_reader")
    imported = [name for name in sys.modules if not name.startswith(ours) and not name.startswith("_")]
    passing = {name: test for name, test in tests.items() if test.pop("passed")}
    paths = {path for test in passing.values() for path in test["lines"]}
    modules = {path: _digest(ROOT / path) for path in paths}
    result.write_text(json.dumps({"of": of, "modules": modules, "tests": passing, "imported": imported}))
    return 0


def run_tests(mutant: Mutant, chosen: list[str]) -> int:
    """Run tests, by their names, with a mutant in the place of its module; return what pytest exits with."""
    from hypothesis import Phase, settings

    # To find out how small an input still fails takes a hundred times as long as to find that one does.
    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None)
    settings.load_profile("mutants")
    name = "llmint8." + mutant.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    sys.meta_path.insert(0, _Finder(name, mutant.source))
    wanted = {test: number for number, test in enumerate(chosen)}

    class Chosen:
        def pytest_collection_modifyitems(self, items: list[Any]) -> None:
            items[:] = [item for item in items if item.nodeid in wanted]

    files = dict.fromkeys(test.partition("::")[0].removeprefix("tests/") for test in chosen)
    return _pytest(list(files), [Chosen()])


class _Finder(importlib.abc.MetaPathFinder):
    """Gives one module another source."""

    def __init__(self, name: str, source: str) -> None:
        self._name, self._source = name, source

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self._name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        loader = importlib.machinery.SourceFileLoader(name, spec.origin or "")
        source, origin = self._source, spec.origin or ""
        loader.get_code = lambda fullname: compile(source, origin, "exec")  # type: ignore[method-assign]
        spec.loader = loader
        return spec


def _pytest(files: list[str], plugins: list[Any]) -> int:
    import pytest

    folder = tempfile.mkdtemp(prefix="mutant-")
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = folder
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={folder}/tests"]
    try:
        return int(pytest.main([*options[1 if plugins[0].__class__.__name__ == "Recorder" else 0 :], *files], plugins))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fork(action: Callable[[], int], seconds: float) -> int:
    """Run an action in a child that may take so many seconds of the processor; return its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(60 * MOST_MINUTES)
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
        nowhere = os.open(os.environ.get("MUTATION_LOG", os.devnull), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        for number in range(3):
            os.dup2(nowhere, number)
        os.chdir(ROOT / "tests")
        code = action()
    finally:
        os._exit(code)


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
