"""Merges in forks of one process that has imported everything, so that many can be killed in little time.

Reads requests as JSON lines from stdin, and answers each with a JSON line when its merge has ended.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = Path(__file__).resolve().parent.parent


class MergeDriver:
    """The process that forks; used by tests."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "tests.merge_driver"]
        self._process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def merge(self, *args: str, **request: Any) -> dict[str, Any]:
        """Run `dsft merge --json`.

        Args:
            args: Its arguments.
            request: `signal`, sent `after_s` seconds after `phase` has begun; `step`, the change of the file system at
                which the process kills itself while the model is moved in; `can_exchange`; `max_shard_bytes`;
                `is_forked`.

        Returns:
            `code`, the exit code or the negative signal; `records` that it printed; `wall_s` since `phase` had begun.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        print(json.dumps({"args": args, **request}), file=stdin, flush=True)
        answer: dict[str, Any] = json.loads(stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=60)


def _serve() -> None:
    import bitsandbytes  # noqa: F401
    import torch
    from peft import PeftModel  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    import dsft.cli.merge
    import dsft.merge.run
    import dsft.merge.verify
    import dsft.merge.write  # noqa: F401

    torch.set_num_threads(1)  # a fork has none of its parent's threads
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        reader, writer = os.pipe()
        process_id = os.fork()
        if process_id == 0:
            os.close(reader)
            _merge(request, writer)
        os.close(writer)
        answer = _follow(process_id, os.fdopen(reader), request)
        print(json.dumps(answer), file=answers, flush=True)


def _merge(request: dict[str, Any], output: int) -> NoReturn:
    from dsft.cli.app import main
    from dsft.core import staging
    from dsft.merge import shards, target

    os.dup2(output, 1)
    if "max_shard_bytes" in request:
        shards.lay_out = partial(shards.lay_out, max_bytes=request["max_shard_bytes"])  # type: ignore[assignment]
    move_in = target.move_in

    def move_in_by_steps(source: Path, place: Path) -> None:
        if "step" in request:
            _kill_itself_at_step(request["step"])
        if not request.get("can_exchange", True):
            staging._exchange = lambda first, second: False
        move_in(source, place)

    target.move_in = move_in_by_steps  # type: ignore[attr-defined]
    os._exit(main(["merge", *request["args"], "--json"]))


def _kill_itself_at_step(step: int) -> None:
    from dsft.core import staging

    left = step

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **settings: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return change(*args, **settings)

        return run

    for name in ("rename", "unlink", "rmdir", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    staging._exchange = counted(staging._exchange)


def _follow(process_id: int, output: Any, request: dict[str, Any]) -> dict[str, Any]:
    lines = []
    started_s = time.perf_counter()
    for line in output:
        lines.append(line)
        if f'"phase": "{request.get("phase", "merge")}"' in line:
            break
    begun_s = time.perf_counter()
    if "signal" in request:
        time.sleep(request["after_s"])
        os.kill(process_id, request["signal"])
    lines += output
    output.close()
    code = os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])
    wall_s = time.perf_counter() - begun_s
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return {"code": code, "records": records, "wall_s": wall_s, "start_s": begun_s - started_s}


if __name__ == "__main__":
    _serve()
