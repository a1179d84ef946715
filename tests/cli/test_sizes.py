"""A case that does not fit into memory is refused before anything is made, by every command that takes one."""

from __future__ import annotations

import re

import pytest

from tests.support.command_line import python

HUGE = "E=8,k=2,H=999999999,I=96,T=33,r=4"
COMMANDS: dict[str, list[str]] = {
    "repro": ["repro", HUGE],
    "repro --fresh": ["repro", "small,T=99999999", "--fresh"],
    "verify": ["verify", "--case", "E=2,k=1,H=99999999,I=99999999,T=1,r=1", "--mode", "forward"],
    "verify, another engine": ["verify", "--case", HUGE, "--mode", "backward", "--engine", "torch_bf16"],
    "verify --mode training": ["verify", "--case", HUGE, "--mode", "training"],
    "diagnose": ["diagnose", HUGE],
    "debug nan": ["debug", "nan", HUGE],
    "debug gradients": ["debug", "gradients", f"E={10**12},k=1,H=8,I=8,T=1,r=1"],
    "bench layer": ["bench", "layer", HUGE],
    "bench sweep": ["bench", "sweep", "qlen", "--case", "E=2,k=1,H=8,I=8,T=1,r=999999999999"],
    "profile": ["profile", HUGE],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_case_that_does_not_fit_is_refused(command: str) -> None:
    # a process of its own, with an end to its memory: a command that makes the inputs first dies here
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, 6 << 30)); "
    run = "sys.argv = ['ktverify', *sys.argv[1:]]; runpy.run_module('ktverify', run_name='__main__')"
    done = python("-c", limit + run, *COMMANDS[command])
    assert done.returncode in (1, 2), done.stdout + done.stderr
    text = done.stdout + done.stderr
    assert "Traceback" not in text, text
    assert re.search(
        r"needs [\d.e+]+ \w*B.*[\d.]+ \w*B are (available|free); take (a smaller case|fewer experts)", text
    ), text
