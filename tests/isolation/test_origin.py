"""What is reported of an engine that raises, ends its process, hangs or takes too much: the call and its own line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ktverify.checks.accuracy import verdict_of
from ktverify.checks.registry import PRELOAD
from ktverify.checks.target import Target
from ktverify.errors import EngineDied
from ktverify.isolation.child import ChildPool, Limits, raised_by_the_engine
from ktverify.isolation.origin import describe
from tests.support import sick
from tests.support.command_line import TINY, python

POOL = Limits(15.0, 2 << 30)

# engine -> (verdict, call, how the text goes on, what is in it)
ENDS = {
    "SegfaultInForward": ("CRASH", "forward_sft", "the process died of SIGSEGV", "about to read"),
    "ExitsInForward": ("CRASH", "forward_sft", "the process ended with exit code 3", "(none)"),
    "HangInBackward": ("TIMEOUT", "backward", "no answer after 15 s", "going to sleep"),
    "EatsInBackward": ("OOM", "backward", "2.", "GiB were resident, the limit is 2.0 GiB"),
    "SegfaultInUpdate": ("CRASH", "update_lora_weights", "the process died of SIGSEGV", "in update_lora_weights"),
}
# engine -> the beginning of the message; its end is the line of the engine that is innermost in the traceback
RAISES = {
    "RaisesInConstructor": "constructor: ZeroDivisionError: integer division or modulo by zero",
    "RaisesInFactory": "constructor: KeyError: no_such_size",
    "RaisesInTorch": "forward_sft: RuntimeError: mat1 and mat2 shapes cannot be multiplied",
    "RaisesDeepInside": "backward: IndexError: list index out of range",
    "RaisesInUpdate": "update_lora_weights: ValueError: no update",
    "LeavesInBackward": "CRASH backward: SystemExit: 3",
}


@pytest.fixture(scope="module")
def pool() -> Iterator[ChildPool]:
    with ChildPool(POOL, POOL, PRELOAD, hosts=True) as children:
        yield children


@pytest.mark.parametrize("name", ENDS)
def test_a_process_that_ends_is_told_with_its_call(pool: ChildPool, name: str) -> None:
    verdict, call, how, inside = ENDS[name]
    with pytest.raises(EngineDied) as raised:
        pool.get().call(sick.calls, Target(f"{sick.__name__}:{name}"))
    text = str(raised.value)
    assert (raised.value.verdict, raised.value.call) == (verdict, call), text
    assert text.startswith(f"tests.support.sick:calls, in {call}: {how}"), text
    assert inside in text
    frames = [line for line in text.splitlines() if line.startswith('  File "')]
    # of a dump only the engine's own lines, and what they called
    assert all("support/sick.py" in frame or "ctypes" in frame or "psutil" in frame for frame in frames), text
    assert frames or how.startswith("the process ended")


@pytest.mark.parametrize("name", RAISES)
def test_an_exception_is_told_with_the_engines_own_line(pool: ChildPool, name: str) -> None:
    with pytest.raises(Exception) as raised:
        pool.get().call(sick.calls, Target(f"{sick.__name__}:{name}"))
    assert raised_by_the_engine(raised.value)
    verdict, text = verdict_of(raised.value)
    assert verdict == "CRASH"
    assert text.startswith(RAISES[name]), text
    at = re.search(r" \(sick\.py:(\d+)\)$", text)
    assert at is not None, text
    assert f"# {name} raises here" in sick.LINES[int(at.group(1)) - 1]


@pytest.mark.parametrize("where", ["import", "forward_sft"])
def test_the_last_words_are_told_where_stderr_is_a_file_for_writing_alone(where: str, tmp_path: Path) -> None:
    """As after 2> FILE of a shell."""
    engine, errors = tmp_path / "engine.py", tmp_path / "errors"
    engine.write_text("import os\nos.abort()\n" if where == "import" else f"from {sick.__name__} import *\n")
    name = f"{engine}:{'Engine' if where == 'import' else 'SegfaultInForward'}"
    done = python(
        "-c",
        "import os, runpy, sys; os.dup2(os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT), 2); "
        "runpy.run_module('ktverify', run_name='__main__', alter_sys=True)",
        *(errors, "repro", TINY, "--engine", name),
    )
    assert done.returncode == 1, errors.read_text(encoding="utf-8")
    signal = {"import": "SIGABRT", "forward_sft": "SIGSEGV"}[where]
    assert re.search(rf"^CRASH {where}: the process died of {signal}; last words:\n", done.stdout, re.MULTILINE)


def test_what_a_check_finds_has_no_origin() -> None:
    with pytest.raises(AssertionError) as raised:
        Target("torch_bf16").expect(False, "too large", "rel_l2")
    assert describe(raised.value) == "GateFailed: too large"
