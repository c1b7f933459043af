"""Imports the trainer once and forks ranks of it, which takes seconds off every start. One JSON line in, one out:

{"fork": [arguments of nova_sys.train], "env": {...}, "log": path, "first": Python code to run before} -> pid
{"poll": pid} -> its exit code, or null
"""

import json
import os
import sys
import traceback

import nova_sys.trainer  # noqa: F401
from nova_sys import train


def become_rank(order: dict) -> None:
    os.setsid()
    os.environ.update(order["env"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    exec(order["first"], {})
    code: object = 1
    try:
        code = train.main(order["fork"]) or 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


for line in sys.stdin:
    order = json.loads(line)
    if "poll" in order:
        pid, status = os.waitpid(order["poll"], os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if pid else None
    else:
        answer = os.fork()
        if answer == 0:
            become_rank(order)
    print(json.dumps(answer), flush=True)
