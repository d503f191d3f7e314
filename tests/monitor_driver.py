"""Runs dsft on a machine whose NVML is the fake: `python tests/monitor_driver.py SCENARIO -- monitor --once`.

SCENARIO is a name in tests/nvml_scenarios.py or a JSON file of the same layout. Processes of the scenario are real
ones, children of this one, so that user and command are real too; they end with it.
"""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

SECRET = "hunter22"
"""Stands on the command line of every process that is started here; no screen may show it."""


def start_processes(count: int) -> list[subprocess.Popen[bytes]]:
    """Start processes that wait until their input is closed, at the latest when this one ends."""
    arguments = ["/opt/venv/bin/python3", "-c", "read _", "train.py", "--hub-token", SECRET, "--rank"]
    return [
        subprocess.Popen([*arguments, str(rank)], executable="/bin/sh", stdin=subprocess.PIPE) for rank in range(count)
    ]


def _main(scenario_name: str, arguments: list[str]) -> int:
    sys.path.insert(0, str(REPOSITORY))
    from tests.nvml_scenarios import make_nvml, read_scenario

    scenario = read_scenario(scenario_name)
    processes = start_processes(scenario.get("num_processes", 0))
    pids = [process.pid for process in processes]
    sys.modules["pynvml"] = make_nvml(scenario, pids or None)  # type: ignore[assignment]  # an object does for a module
    from dsft.cli.app import main

    try:
        return main(arguments)
    finally:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            process.wait(timeout=10)


if __name__ == "__main__":
    separator = sys.argv.index("--")
    sys.exit(_main(sys.argv[1], sys.argv[separator + 1 :]))
