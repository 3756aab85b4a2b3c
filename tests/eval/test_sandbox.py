"""The sandbox: programs that pass and fail, and attacks that change nothing outside."""

import concurrent.futures
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import message_of

from eval import sandbox
from eval.sandbox import Limits, seccomp
from eval.tasks import TASKS
from eval.tasks.code import Mbpp
from eval.tasks.task import Prediction

# Time to spare on the clock, for a busy machine; little for what would never end by itself.
QUICK = Limits(cpu_seconds=1, wall_seconds=100)
QUICKEST = Limits(cpu_seconds=1, wall_seconds=3)
TEST = "assert double(2) == 4"
RIGHT = "def double(x): return 2 * x\n"

ENDED = "ended before its tests did"
# Each tries something and then, if it still can, offers a right solution. ("raise" is how a program
# says what it could do; the expected failure shows that it could not.)
ADVERSARIES = {
    "exit": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "exit at once": ("import os; os._exit(0)", ENDED),
    "exit at the first call": (
        "import os\nclass Answer:\n    def __eq__(self, _): os._exit(0)\n"
        "double = lambda x: Answer()\nSKIP_SOLUTION = 1",
        ENDED,
    ),
    "forge the result": (
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'passed' * 9)\n"
        "    except OSError: pass",
        "passedpassed",
    ),
    "infinite loop": ("while True: pass", "ended by SIGKILL"),
    "sleep": ("import time; time.sleep(1000)", "took too long"),
    "fork bomb": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "ended by SIGKILL",
    ),
    "threads": (
        "import threading, time\n"
        "while True: threading.Thread(target=time.sleep, args=(99,)).start()",
        "RuntimeError: can't start new thread",
    ),
    "memory hog": ("x = bytearray(1 << 33)", "MemoryError"),
    "slow memory hog": (
        "x = []\nwhile True: x.append(' ' * 10**6 + str(len(x)))",
        ("MemoryError", "ended by SIG"),  # whichever limit comes first, memory's or the CPU time's
    ),
    "huge output": ("while True: print('x' * 10**6)", "wrote too much output"),
    "huge error output": ("import os\nwhile True: os.write(2, b'x' * 10**6)", "wrote too much"),
    "huge result": (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'x' * 10**4)\n"
        "    except OSError: pass",
        "wrote too much output",
    ),
    "huge file": ("open('/tmp/f', 'wb').write(bytes(1 << 26))", "OSError: [Errno 27]"),
    "many files": (
        "n = 0\nwhile True:\n    n += 1\n    open(f'/tmp/{n}', 'wb').write(bytes(1 << 20))",
        "OSError: [Errno 28] No space",
    ),
    "deep recursion": (
        "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        ("ended by SIG", "MemoryError"),
    ),
    "delete outside": ("import os; os.remove(VICTIM)", "FileNotFoundError"),
    "overwrite the interpreter": (
        "import os\nopen(os.__file__, 'a').write('x')",
        ("OSError: [Errno 30] Read-only", "PermissionError"),
    ),
    "change modes": ("import os; os.chmod(os.__file__, 0)", "OSError: [Errno 30] Read-only"),
    "write to devices": ("open('/dev/sda', 'wb')", ("OSError: [Errno 30]", "PermissionError")),
    "connect": (
        "import socket; socket.create_connection(('127.0.0.1', PORT), 2)",
        "PermissionError",
    ),
    "look up a name": (
        "import socket; socket.getaddrinfo('example.com', 80)",
        "gaierror",
    ),
    "read the keys": ("import os; os.environ['OPENAI_API_KEY']", "KeyError: 'OPENAI_API_KEY'"),
    "read the parent's keys": (
        "import os; open(f'/proc/{os.getppid()}/environ').read()",
        "FileNotFoundError",
    ),
    "read a file outside": ("open(VICTIM).read()", "FileNotFoundError"),
    "kill the parent": (
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill(-1, signal.SIGKILL)",
        "ProcessLookupError",
    ),
    "kill the evaluation": ("import os; os.kill(PARENT, 9)", "ProcessLookupError"),
    "new namespaces": (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.unshare(0x10000000): raise OSError(ctypes.get_errno(), 'unshare')",
        "PermissionError: [Errno 1]",
    ),
    "unmount": (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.umount2(b'/usr', 2): raise PermissionError(ctypes.get_errno(), 'umount')",
        "PermissionError: [Errno 1]",
    ),
    "run a program": ("import subprocess; subprocess.run(['true'])", "PermissionError"),
}
ENDLESS = ("sleep",)
FAST = ("exit", "exit at once", "infinite loop", "delete outside", "connect", "read the keys")

needs_containment = pytest.mark.usefixtures("contained")


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Yields targets of attacks: a file, an open port, a key in the environment, a process."""
    import socket

    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {
            "VICTIM": repr(str(victim)),
            "PORT": str(server.getsockname()[1]),
            "PARENT": str(os.getpid()),
        }
    assert victim.read_text() == "precious"


def attack(name: str, outside: dict[str, str]) -> str | None:
    program, _ = ADVERSARIES[name]
    for word, value in outside.items():
        program = program.replace(word, value)
    skip = "SKIP_SOLUTION" in program
    limits = QUICKEST if name in ENDLESS else QUICK
    return sandbox.run(program + "\n" + ("" if skip else RIGHT), TEST, limits)


def assert_contained(name: str, failure: str | None) -> None:
    expected = ADVERSARIES[name][1]
    expected = (expected,) if isinstance(expected, str) else expected
    assert failure is not None, name
    assert failure.startswith(expected), (name, failure)


def sandboxes(owner: int) -> list[int]:
    """Returns the processes of sandboxes that a process started, or whose parent is gone."""
    command = ["ps", "-eww", "-o", "pid=,ppid=,args="]  # not cut to the width of a screen
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listing.splitlines()]
    parents = {int(pid): int(parent) for pid, parent, *_ in rows}
    inside = {int(pid) for pid, _, *args in rows if "sandbox/launcher.py" in "".join(args)}

    def starter(pid: int) -> int:
        while pid in inside:
            pid = parents[pid]
        return pid

    return [pid for pid in inside if starter(pid) in (owner, 1)]


def all_end(seconds: float = 20) -> bool:
    """Returns whether all sandboxes end, given the time that the kernel needs to end them."""
    deadline = time.monotonic() + seconds
    while sandboxes(os.getpid()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not sandboxes(os.getpid())


@needs_containment
def test_passes_and_fails():
    programs = [
        (RIGHT, TEST),
        ("def double(x): return x * x * x\n", TEST),
        ("def double(x) return", TEST),
        ("", TEST),
        (RIGHT + "print('x' * 1000)\nopen('notes', 'w').write(str(double(2)))\n", TEST),
        (RIGHT + "if __name__ == '__main__': input()\n", TEST),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\n" + RIGHT, TEST),
    ]
    results = sandbox.run_all(programs, QUICK)
    assert [result is None for result in results] == [True, False, False, False, True, True, True]
    assert results[1].startswith("AssertionError")
    assert results[2].startswith("SyntaxError")
    assert results[3].startswith("NameError")


@pytest.mark.parametrize("name", FAST)
@needs_containment
def test_contains(name, outside):
    assert_contained(name, attack(name, outside))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ADVERSARIES.keys() - set(FAST)))
@needs_containment
def test_contains_everything(name, outside):
    assert_contained(name, attack(name, outside))
    assert all_end()


@pytest.mark.parametrize(
    "program",
    [
        "class Answer:\n    def __eq__(self, _): return True\ndef double(x): return Answer()",
        "import sys\nrequest = sys._getframe().f_back.f_locals['request']\n"
        "double = lambda x: int(request['program'].split()[-1])",
        "import os, sys\ntoken = sys._getframe().f_back.f_locals['request']['token']\n"
        "os.write(sys._getframe().f_back.f_globals['RESULT'], token.encode()); os._exit(0)",
    ],
    ids=["equal to everything", "reads the tests", "finds the token"],
)
@needs_containment
def test_what_the_documentation_says_a_program_can_do_to_its_score(program):
    assert sandbox.run(program, TEST, QUICK) is None


# Asks for a huge page, touches a page of it, and looks whether the next is in memory too.
NEIGHBOUR = """
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
address = libc.mmap(ctypes.c_void_p(1 << 40), ctypes.c_size_t(1 << 21), 3, 0x22, -1, 0)
libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(1 << 21), 14)
ctypes.memset(address, 1, 1)
found = ctypes.create_string_buffer(16)
assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(1 << 16), found) == 0
assert found[0][0] == 1 and found[15][0] == 0
"""


@needs_containment
def test_huge_pages_are_off():
    assert sandbox.run(NEIGHBOUR + RIGHT, TEST, QUICK) is None


# Each kind of memory is tried up to 640 MiB, so that the test itself is bounded without a filter.
GREEDY = """
import contextlib, ctypes, fcntl, mmap, os, time
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
SIZE, kept = 1 << 24, []

def page(at):
    address = libc.mmap(ctypes.c_void_p(at), ctypes.c_size_t(4096), 3, 0x22, -1, 0)
    ctypes.memset(address, 1, 1)

def memory_file():
    kept.append(os.memfd_create("x"))
    os.write(kept[-1], bytes(SIZE))

def segment():
    libc.shmat.restype = ctypes.c_void_p
    address = libc.shmat(libc.shmget(0, ctypes.c_size_t(SIZE), 0o1600), None, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError
    ctypes.memset(address, 1, SIZE)
    libc.shmdt(ctypes.c_void_p(address))

def shared():
    kept.append(mmap.mmap(-1, SIZE))
    kept[-1].write(bytes(SIZE))

def file():
    open(str(time.monotonic_ns()), "wb").write(bytes(1 << 20))

def pipe():
    ends = os.pipe()
    kept.append(ends)
    os.set_blocking(ends[1], False)
    fcntl.fcntl(ends[1], 1031, 1 << 20)
    os.write(ends[1], bytes(1 << 20))

def child():
    if os.fork() == 0:
        x = bytearray(b"x") * (100 << 20)
        time.sleep(3)
        os._exit(0)

for attempt in memory_file, segment, shared, child, file, pipe:
    with contextlib.suppress(OSError):
        for _ in range(40):
            attempt()
with contextlib.suppress(ValueError, OSError):
    for n in range(60000):  # each page needs two page tables of its own
        page((1 << 40) + (n << 30))
with contextlib.suppress(MemoryError):
    while True:
        kept.append(bytearray(b"x") * (1 << 20))
time.sleep(1)
"""


def memory(pids: list[int]) -> int:
    """Returns the memory of processes and of all shared memory of this machine, in bytes."""
    total = 0
    for path in [Path("/proc/meminfo"), *(Path(f"/proc/{pid}/status") for pid in pids)]:
        with contextlib.suppress(OSError):
            fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
            kinds = ("Shmem", "RssAnon", "VmPTE")
            total += sum(int(fields[kind].split()[0]) << 10 for kind in kinds if kind in fields)
    return total


@pytest.mark.slow
@needs_containment
def test_all_memory_of_a_program_is_bounded():
    before = peak = memory([])
    limits = Limits(cpu_seconds=20, wall_seconds=100)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        run = pool.submit(sandbox.run, GREEDY + RIGHT, TEST, limits)
        while not run.done():
            peak = max(peak, memory(sandboxes(os.getpid())))
            time.sleep(0.02)
    assert 500 << 20 < peak - before < 1 << 30
    assert run.result() is None


@pytest.mark.slow
@needs_containment
def test_what_a_program_leaves_running_dies_with_it():
    stay = "import threading, time\nthreading.Thread(target=time.sleep, args=(98765,)).start()\n"
    assert sandbox.run(stay + RIGHT, TEST, QUICK) is None
    assert all_end()


@pytest.mark.slow
@needs_containment
def test_a_killed_evaluation_leaves_no_program_behind(tmp_path):
    script = "from eval import sandbox; sandbox.run('import time; time.sleep(98765)', '')"
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=Path(sandbox.__file__).parents[2]
    )

    deadline = time.monotonic() + 30
    while len(sandboxes(process.pid)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert all_end()


def test_refuses_where_it_cannot_contain(monkeypatch, tmp_path):
    broken = tmp_path / "launcher.py"
    source = sandbox._LAUNCHER.read_text()
    broken.write_text(source.replace("namespaces = _NEWUSER |", "namespaces = 0x1 | _NEWUSER |"))
    monkeypatch.setattr(sandbox, "_LAUNCHER", broken)
    message = message_of(sandbox.check)
    assert "creating namespaces: Invalid argument" in message
    assert "leave the code tasks out" in message


def test_refuses_another_machine(monkeypatch):
    monkeypatch.setattr(seccomp, "MACHINES", ("riscv64",))
    assert "needs Linux on x86_64 or aarch64" in message_of(sandbox.check)


@pytest.mark.slow
@needs_containment
@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_canonical_solutions_pass(shared, every):
    humaneval, mbpp = TASKS["humaneval"], TASKS["mbpp"]
    problems = read_rows(shared / "data" / humaneval.local_file)
    programs = [
        humaneval.program(Prediction(example, "", row["canonical_solution"]))
        for example, row in zip(
            humaneval.examples(("", row) for row in problems), problems, strict=True
        )
    ]
    rows = read_rows(shared / "data" / mbpp.local_file)
    # All problems, not only the test split.
    few = {row["task_id"]: row for row in rows if row["task_id"] in (2, 3, 4)}
    for row in rows:
        (example,) = Mbpp().examples(("", r) for r in [*few.values(), row | {"task_id": 11}])
        programs.append(mbpp.program(Prediction(example, "", row["code"])))
    assert len(programs) == 164 + 974
    failures = sandbox.run_all(programs[::every])
    assert {i: failure for i, failure in enumerate(failures) if failure} == {}


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@needs_containment
def test_no_text_of_a_program_is_special():
    assert sandbox.run('text = "\\"\\ud83d 语言"\n' + RIGHT, TEST, QUICK) is None
    assert sandbox.run("\x00", TEST, QUICK).startswith(("ValueError", "SyntaxError"))
