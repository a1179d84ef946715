"""All exceptions of the package, and which exceptions of libraries a user can cause. Imports the standard library only.

KtverifyError
|-- Unsupported          NotImplementedError   the engine states that it cannot do this
|-- EngineFailed         .verdict              the engine gave no answer
|   |-- EngineRaised     CRASH                 one of its methods raised an exception
|   `-- EngineDied       CRASH                 its process ended
|       |-- EngineTimeout      TIMEOUT         ... was ended at the time limit
|       `-- EngineOutOfMemory  OOM             ... was ended at the memory limit
|-- CheckFailed          AssertionError        the engine gave an answer, and it is wrong
|   |-- GateFailed                             the tensors of one check exceed a gate
|   |-- NotPassed                              a tensor of an accuracy case did not pass
|   `-- PropertyFailed   .verdict              a drawn case does not have a property
|-- RemoteError                                an exception of another process, as text
|-- NotDeclared          RuntimeError          a NotImplementedError that is no declaration of the engine's
|-- NotExact             AssertionError        integer data for which fp32 sums may round
|-- NoGolden             FileNotFoundError     a case has no golden
|-- AdapterMismatch      ValueError            an adapter does not fit its base model
|-- NotFinite            RuntimeError          a training's loss or gradient is NaN or Inf
|-- RankLost             RuntimeError          another process of the same training ended
|-- WrongKeys            ValueError            a configuration cannot be used
|-- NoBase               ValueError            the base model of an adapter cannot be loaded
`-- NothingMeasured      ValueError            a bench run has no measurement that counts
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import traceback
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


class KtverifyError(Exception):
    """Base of all exceptions that this package defines."""


class Unsupported(KtverifyError, NotImplementedError):
    """NotImplementedError of an engine in a call that should compute; the text is its reason. Never a pass."""


class EngineFailed(KtverifyError):
    """The engine gave no answer. verdict: CRASH, TIMEOUT or OOM."""

    verdict = "CRASH"


class EngineRaised(EngineFailed):
    """A method of the engine raised an exception: "CRASH forward_sft: ValueError: … (my_engine.py:7)"."""


class EngineDied(EngineFailed):
    """The engine's process ended, or gave no answer. The text says how, and may contain its last lines of output.

    Not a RuntimeError, so that a check which expects the engine to refuse something does not accept its death.
    call: the method of the engine that it was in, how: what happened; "" where that is not known. lasted: for how many
    seconds it had been in it, 0 where that is not known.
    """

    call = how = ""
    lasted = 0.0

    @classmethod
    def of(cls, call: str, how: str, words: str = "") -> Self:
        """The exception, with its verdict in front and the last words of the process behind."""
        error = cls(f"{cls.verdict} {call}: {how}" + (f"; last words:\n{words}" if words else ""))
        error.call, error.how = call, how
        return error


class EngineTimeout(EngineDied):
    """The engine's process gave no answer within the time limit and was ended."""

    verdict = "TIMEOUT"


class EngineOutOfMemory(EngineDied):
    """The engine's process and its descendants used more memory than the limit and were ended."""

    verdict = "OOM"


class CheckFailed(KtverifyError, AssertionError):
    """The engine gave an answer, and it is wrong. verdict: FAIL."""

    verdict = "FAIL"


class GateFailed(CheckFailed):
    """What a check found: its text, and (gate, used share of its budget) for each gate that was exceeded.

    cause: a checks.causes.Cause, where it is known better than by the check alone. result: the checks.problem.Result
    that was judged. Both stay in the process that raised it.
    """

    def __init__(
        self, text: str, exceeded: tuple[tuple[str, float], ...], *, cause: Any = None, result: Any = None
    ) -> None:
        super().__init__(text, exceeded)
        self.exceeded, self.cause, self.result = exceeded, cause, result

    def __reduce__(self) -> tuple[type[GateFailed], tuple[object, ...]]:
        return type(self), self.args

    def __str__(self) -> str:
        return str(self.args[0])


class NotPassed(CheckFailed):
    """A tensor did not pass; the records of its case contain it already."""


class PropertyFailed(CheckFailed):
    """A property does not hold: the smallest case found, what differs, and the command that repeats it.

    verdict: FAIL; CRASH, TIMEOUT or OOM where the engine gave no answer for the case.
    """

    def __init__(self, text: str, verdict: str = "FAIL") -> None:
        super().__init__(text)
        self.verdict = verdict


class RemoteError(KtverifyError):
    """The traceback of an exception that another process raised, as text.

    It is the cause of the same exception raised here, and is raised itself where that one cannot be pickled.
    """


class NotDeclared(KtverifyError, RuntimeError):
    """A NotImplementedError that the engine did not raise: one of torch's. It declares nothing."""


class NotExact(KtverifyError, AssertionError):
    """An operand is not a bf16 number, a sum may round, or a gate is neither open nor shut."""


class NoGolden(KtverifyError, FileNotFoundError):
    """The case has no golden: it is not an unchanged row of the catalogue, or its golden was never made."""


class AdapterMismatch(KtverifyError, ValueError):
    """The tensors of a stored adapter are not those that its base model has."""


class NotFinite(KtverifyError, RuntimeError):
    """The loss or the gradient of a training's step is NaN or Inf."""


class RankLost(KtverifyError, RuntimeError):
    """Another process of the same training ended, or gave no answer within the group's timeout."""


class WrongKeys(KtverifyError, ValueError):
    """A configuration cannot be used. lines: what is wrong with each key."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


class NoBase(KtverifyError, ValueError):
    """The base model of an adapter cannot be loaded."""


class NothingMeasured(KtverifyError, ValueError):
    """A bench run has no measurement that counts, so it has no views."""


# ---- exceptions that a user can cause

# by wrong arguments, broken files, a full disk, an engine that refuses; any other exception is a defect
_EXPECTED = (
    *(ValueError, TypeError, KeyError, RuntimeError, OSError, MemoryError, ImportError, EOFError, KtverifyError),
    *(pickle.PickleError, zipfile.BadZipFile, subprocess.SubprocessError),
)
# (module, class) of libraries, which are imported by those alone who use them
_OF_LIBRARIES = (
    ("jinja2", "TemplateError"),
    ("safetensors", "SafetensorError"),
    ("yaml", "YAMLError"),
    ("csv", "Error"),
    ("huggingface_hub.errors", "HfHubHTTPError"),
    ("huggingface_hub.errors", "HFValidationError"),
    ("httpx", "HTTPError"),
    ("requests", "RequestException"),
    ("torch.distributed.elastic.multiprocessing.errors", "ChildFailedError"),
    ("torch._dynamo.exc", "TorchDynamoException"),
    ("filelock", "Timeout"),
)
_PACKAGE = Path(__file__).resolve().parent


def is_expected(error: Exception) -> bool:
    """Whether the exception is one that a user can cause, so that one line is the answer.

    Those are the classes listed here, a bare Exception (tokenizers raises it), and any that a library's own Python code
    raised: what it was given is at fault more often than this package."""
    kinds = [getattr(sys.modules[name], kind, None) for name, kind in _OF_LIBRARIES if name in sys.modules]
    if type(error) is Exception or isinstance(error, (*_EXPECTED, *filter(None, kinds))):
        return True
    raised_in = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    return bool(raised_in) and "site-packages" in raised_in[-1].parts and _PACKAGE not in raised_in[-1].parents


def one_line(error: BaseException) -> str:
    """The exception's text in one line; with its class, where the text alone would say little or is a library's."""
    text = " ".join(str(error).split())
    own = isinstance(error, KtverifyError) or type(error) in (ValueError, TypeError, RuntimeError, ImportError)
    if isinstance(error, KeyError) and error.args:
        text = " ".join(str(error.args[0]).split())
        own = " " in text
    if isinstance(error, OSError):
        own = bool(text)
    name = type(error).__name__
    return text if own and text else f"{name}: {text}" if text else name
