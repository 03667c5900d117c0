"""Some operations by one backend, case after case, told line by line.

A process of its own (`python -m fused_attn.selftest.worker`): where a case hangs or breaks the
device, whoever started it goes on without it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import torch

from ..ops import dispatch
from ..ops.operations import OPERATIONS
from .cases import DTYPES, Case, cases
from .memory import Skipped, poisoned


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def main(arguments: list[str]) -> int:
    """Arguments: operation, backend, device, how, threads (0: torch's own), cases to leave out."""
    operation, backend, device, how, threads, skip = arguments
    if int(threads):
        torch.set_num_threads(int(threads))
    lacking = reasons(operation, backend, device)
    for number, case in enumerate(cases(operation, how)):
        if number < int(skip):
            continue
        told = {"number": number, "case": case.name, "dtype": case.dtype, "size": case.size}
        if lacking[case.dtype]:
            tell(**told, status="refused", why=lacking[case.dtype][0])
            continue
        tell(**told, status="started")
        with contextlib.nullcontext() if case.timed else poisoned():
            told |= outcome(case, backend, device)
        tell(**told)
    return 0


def reasons(operation_name: str, backend_name: str, device: str) -> dict[str, list[str]]:
    """By dtype: why the backend runs nothing of it here."""
    [operation] = [each for each in OPERATIONS if each.name == operation_name]
    backend = dispatch.find(operation.backends, backend_name)
    return {
        dtype: dispatch.why_not(backend, operation.smallest(torch.device(device), kind))
        for dtype, kind in DTYPES.items()
    }


def outcome(case: Case, backend: str, device: str) -> dict[str, Any]:
    """What there is to tell of a case that was run."""
    try:
        ratio = case.run(backend, device)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
    except Skipped as why:
        return {"status": "skipped", "why": str(why)}
    except dispatch.UnsupportedError as error:
        return {"status": "refused", "why": str(error).splitlines()[-1].strip()}
    except Exception as error:  # whatever it is, it is the finding
        return {"status": "failed", "why": f"{type(error).__name__}: {error}"[:300]}
    return {"status": "passed"} if ratio is None else {"status": "timed", "ratio": ratio}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
