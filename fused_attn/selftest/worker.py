"""One operation and backend, case after case, told line by line.

A process of its own (`python -m fused_attn.selftest.worker`): where a case hangs or breaks the
device, whoever started it goes on without it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from ..ops import dispatch
from ..ops.operations import OPERATIONS
from .cases import DTYPES, cases


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def main(arguments: list[str]) -> int:
    """Arguments: operation, backend, device, "quick" or "full", number of cases to leave out."""
    name, backend_name, device, how, skip = arguments
    [operation] = [each for each in OPERATIONS if each.name == name]
    backend = dispatch.find(operation.backends, backend_name)
    lacking = {
        dtype: dispatch.why_not(backend, operation.smallest(torch.device(device), DTYPES[dtype]))
        for dtype in DTYPES
    }
    for number, case in enumerate(cases(name, how == "quick")):
        if number < int(skip):
            continue
        told = {"number": number, "case": case.name, "dtype": case.dtype, "size": case.size}
        if lacking[case.dtype]:
            tell(**told, status="refused", why=lacking[case.dtype][0])
            continue
        tell(**told, status="started")
        try:
            case.run(backend_name, device)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
        except dispatch.UnsupportedError as error:
            tell(**told, status="refused", why=str(error).splitlines()[-1].strip())
        except Exception as error:  # whatever it is, it is the finding
            tell(**told, status="failed", why=f"{type(error).__name__}: {error}"[:300])
        else:
            tell(**told, status="passed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
