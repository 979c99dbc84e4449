"""What can go wrong on the way to the loopback Hub, as rules that a test adds."""

import re
import threading
from dataclasses import dataclass, field


@dataclass
class Fault:
    """A rule for the requests of a method whose path a regular expression finds.

    The first `skip` of them pass, the next `times` meet the fault (None: all), the others pass.

    Kinds: `status` answers with it; `reset` ends the connection after `after` bytes of the
    request's body; `lose` does the work, then ends the connection instead of answering; `stall`
    neither answers nor works until it is released; `truncate` ends the connection after `after`
    bytes of the answer's body.
    """

    kind: str
    method: str
    path: str
    skip: int = 0
    times: int | None = None
    status: int = 503
    after: int = 0
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    seen: int = 0
    hits: int = 0
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def release(self) -> None:
        """Let stalled requests go on, and those that come later pass."""
        self.times = self.hits
        self.released.set()

    def wait_until_reached(self, seconds: float = 60) -> None:
        assert self.reached.wait(seconds), f"no {self.method} of {self.path} came"


class Faults:
    """The rules of one Hub; the first that applies to a request decides."""

    def __init__(self) -> None:
        self.rules: list[Fault] = []
        self.lock = threading.Lock()

    def add(self, fault: Fault) -> Fault:
        with self.lock:
            self.rules.append(fault)
        return fault

    def meets(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for rule in self.rules:
                if rule.method not in (method, "*") or not re.search(rule.path, path):
                    continue
                rule.seen += 1
                past = rule.seen - rule.skip
                if past > 0 and (rule.times is None or rule.hits < rule.times):
                    rule.hits += 1
                    rule.reached.set()
                    return rule
        return None

    def clear(self) -> None:
        """Forget all rules, and let stalled requests go on."""
        with self.lock:
            for rule in self.rules:
                rule.release()
            self.rules.clear()
