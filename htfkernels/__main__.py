"""``python -m htfkernels [info | verify [KERNELS]...]``: what ``htf info`` and ``htf verify`` do,
without the learn extra."""

import sys
from collections.abc import Sequence

from htfkernels.info import info_text

_FAILED, _USER_ERROR = 1, 2


def main(arguments: Sequence[str]) -> int:
    """Runs a command; its exit code."""
    command, *rest = arguments or ["info"]
    if command == "info" and not rest:
        print(info_text())
        return 0
    if command != "verify":
        print(
            "usage: python -m htfkernels [info | verify [KERNELS]...]",
            file=sys.stderr,
        )
        return _USER_ERROR
    from htfkernels.verify import run as verify  # which `info` need not wait for

    try:
        wanted = verify.chosen(rest)
    except ValueError as error:
        print(f"htfkernels: {error}", file=sys.stderr)
        return _USER_ERROR
    found = list(verify.rows(wanted))
    print(verify.text(found))
    return _FAILED if any(row.failed for row in found) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
