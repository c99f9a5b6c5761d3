"""Run every check of the ``launch_*`` modules and print what went wrong, as JSON: ``test_launch.py`` runs this."""

import json
import traceback
from collections.abc import Callable

if __name__ == "__main__":
    import launch_common  # noqa: F401  # first: it installs the stub

import launch_calls
import launch_descriptors
import launch_kernels
import launch_lifetime

MODULES = (launch_kernels, launch_calls, launch_descriptors, launch_lifetime)
CHECKS: dict[str, Callable[[], None]] = {
    name.removeprefix("check_"): check
    for module in MODULES
    for name, check in vars(module).items()
    if name.startswith("check_")
}


def main() -> None:
    results = dict.fromkeys(CHECKS, "")
    for name, check in CHECKS.items():
        try:
            check()
        except BaseException:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
