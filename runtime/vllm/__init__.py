"""llmint8 checkpoints in vLLM: a plugin, which vLLM finds by its entry point and loads in each of its processes.

    vllm serve model-int8

llmint8 does not depend on vLLM, and this module imports neither it nor torch. `register` is called by vLLM itself; what
it registers are a config (`config.py`), the linear layers (`linear.py`) and the experts of mixtures (`experts.py`).
"""

import logging
from importlib import import_module

# The first release whose interfaces these modules are written for, and the last one they were tested with.
OLDEST = (0, 32)
TESTED = (0, 32)

_log = logging.getLogger("vllm.llmint8")  # below vLLM's own, so that its handlers print it
_registered = False


def register() -> None:
    """Let vLLM serve checkpoints of format 1 and 2; or say in one line why it cannot. Called again, it does nothing."""
    global _registered
    if _registered:
        return
    version = import_module("vllm").__version__
    if (unfit := unfit_version(version)) is not None:
        _log.error("llmint8: not registered: %s", unfit)
        return
    try:
        import_module(".config", __name__)
    except (ImportError, AttributeError) as error:  # what was there in the versions below is not there any more
        _log.error(
            "llmint8: not registered: vLLM %s has other interfaces (%s); take vLLM %s", version, error, _tested()
        )
        return
    _registered = True
    if release(version) > TESTED:
        _log.warning("llmint8: tested with vLLM %s; this is %s", _tested(), version)


def unfit_version(version: str) -> str | None:
    """Say why a version of vLLM cannot do, or None if it may. One that was built from a checkout is not judged."""
    if (0, 0) < release(version) < OLDEST:
        return f"vLLM is {version}, expected {_text(OLDEST)} or newer; update vLLM"
    return None


def release(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version; (0, 0) for one that has none."""
    numbers = version.split(".")[:2]
    return tuple(int(number) for number in numbers) if all(number.isdigit() for number in numbers) else (0, 0)


def _tested() -> str:
    return _text(OLDEST) if OLDEST == TESTED else f"{_text(OLDEST)} to {_text(TESTED)}"


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
