"""The doors of the kernel that the sandbox closes for generated programs."""

import errno
import os
import re
import struct

import pytest
from helpers import message_of

from eval import sandbox
from eval.sandbox import Limits, seccomp

QUICK = Limits(cpu_seconds=1, wall_seconds=100)
TEST = "assert double(2) == 4"
RIGHT = "def double(x): return 2 * x\n"

# What each door lets a program do; the arguments are those with which it opens.
DOORS = {
    "memfd_create": "b'x', 0",
    "shmget": "0, 4096, 0o1600",
    "semget": "0, 1, 0o1600",
    "msgget": "0, 0o1600",
    "mq_open": "b'x', 0o102, 0o600, 0",
    "vmsplice": "PIPE, VECTOR, 1, 0",
    "splice": "FILE, 0, PIPE, 0, 1, 0",
    "tee": "PIPE, PIPE, 1, 0",
    "sendfile": "PIPE, FILE, 0, 1",
    "io_setup": "1, ZEROS",
    "setxattr": "b'/tmp', b'user.a', b'b', 1, 0",
    "socket": "1, 1, 0",  # AF_UNIX
    "socket inet": "2, 1, 0",
    "socket inet6": "10, 1, 0",
    "socket netlink": "16, 3, 0",
    "socket alg": "38, 5, 0",
    "socket vsock": "40, 1, 0",
    "socketpair": "1, 2, 0, ZEROS",  # of datagrams
    "setsockopt": "SOCKET, 1, 7, ONE, 4",
    "sendmsg": "SOCKET, ZEROS, 0",
    "ptrace": "0, 0, 0, 0",
    "process_vm_readv": "PID, VECTOR, 1, VECTOR, 1, 0",
    "kcmp": "PID, PID, 2, 0, 0",
    "unshare": "0x400",
    "setns": "FILE, 0",
    "sync": "",
    "add_key": "b'user', b'a', b'b', 1, -2",
    "request_key": "b'user', b'a', 0, 0",
    "keyctl": "0, -2, 1",
    "inotify_init1": "0",
    "fanotify_init": "0x200, 0",
    "perf_event_open": "ZEROS, 0, -1, -1, 0",
    "userfaultfd": "1",
    "seccomp": "2, 0, ZEROS",
    "modify_ldt": "0, ZEROS, 16",
    "personality": "0xffffffff",
    "mbind": "0, 0, 0, 0, 0, 0",
    "io_uring_setup": "1, ZEROS",
    "pidfd_open": "PID, 0",
    "landlock_create_ruleset": "0, 0, 1",
    "mmap": "0, 4096, 3, 0x21, -1, 0",
    "prctl huge pages": "41, 0, 0, 0, 0",
    "prctl futexes": "78, 1, 1024, 0, 0",
    "ioctl": "FILE, 0x80086601, ZEROS",
    "fcntl pipe": "PIPE, 1031, 8192",
    "fcntl notify": "FOLDER, 1026, 1",
    "fcntl lease": "FILE, 1024, 0",
}
PROCESSES = {
    "fork": "",
    "vfork": "",
    "clone": "17, 0, 0, 0, 0",
    "clone3": "(ctypes.c_uint64 * 11)(0, 0, 0, 0, 17), 88",
    "execve": "b'/usr/bin/true', 0, 0",
    "execveat": "-100, b'/usr/bin/true', 0, 0, 0",
}
OPENERS = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
ZEROS, ONE, PID = ctypes.create_string_buffer(256), ctypes.byref(ctypes.c_int(1)), os.getpid()
VECTOR = (ctypes.c_void_p * 2)(ctypes.addressof(ZEROS), 8)
PIPE, FOLDER = os.pipe()[1], os.open("/tmp", os.O_DIRECTORY)
open("file", "w").write("content")
FILE, ends = os.open("file", os.O_RDONLY), socket.socketpair()
SOCKET = ends[0].fileno()

def error(number, *arguments):
    return ctypes.get_errno() if libc.syscall(number, *arguments) == -1 else 0
"""
MACHINE = os.uname().machine
CALLS = (
    seccomp.refused(MACHINE)
    | {name: numbers[MACHINE != "x86_64"] for name, numbers, *_ in seccomp.CONDITIONS}
    | {"io_uring_setup": 425, "pidfd_open": 434, "clone3": 435, "landlock_create_ruleset": 444}
)
SEVERAL = [name for name in DOORS if name.split()[0] in CALLS]
ALONE = [name for name in PROCESSES if name in CALLS]


needs_containment = pytest.mark.usefixtures("contained")


def opener(name: str) -> str:
    return f"error({CALLS[name.split()[0]]}, {(DOORS | PROCESSES)[name]})"


@pytest.fixture(scope="module")
def errors(contained) -> dict[str, int]:
    """Returns the error numbers of the calls of DOORS (0: it opened), made by one program."""
    program = f"raise Exception(*[{', '.join(opener(name) for name in SEVERAL)}])"
    failure = sandbox.run(OPENERS + program, TEST, QUICK)
    numbers = re.findall(r"\d+", failure.removeprefix("Exception: "))
    return dict(zip(SEVERAL, map(int, numbers), strict=True))


@pytest.mark.parametrize("name", SEVERAL)
def test_closes_the_door(name, errors):
    assert errors[name] in (errno.EPERM, errno.ENOSYS)


@pytest.mark.parametrize("name", ALONE)
@needs_containment
def test_starts_no_process(name):
    program = f"raise OSError({opener(name)}, 'refused')"
    failure = sandbox.run(OPENERS + program, TEST, QUICK)
    assert failure in (
        f"PermissionError: [Errno {errno.EPERM}] refused",
        f"OSError: [Errno {errno.ENOSYS}] refused",
    )


def verdict(machine: str, architecture: int, number: int, *arguments: int) -> int:
    """Returns the error of a call by the filter's instructions, 0 if the call is allowed."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    code = list(struct.iter_unpack("<HBBI", seccomp.program(machine)))
    at, value = 0, 0
    while True:
        operation, yes, no, constant = code[at]
        at += 1
        if operation == 0x20:
            (value,) = struct.unpack_from("<I", data, constant)
        elif operation == 0x54:
            value &= constant
        elif operation == 0x06:
            return 0 if constant == 0x7FFF0000 else constant & 0xFFFF
        else:
            at += yes if {0x15: value == constant, 0x25: value > constant}[operation] else no


@pytest.mark.parametrize(
    ("machine", "architecture", "reads", "clone", "newest"),
    [("x86_64", 0xC000003E, 0, 56, 334), ("aarch64", 0xC00000B7, 63, 220, 294)],
)
def test_the_filter_of_each_machine(machine, architecture, reads, clone, newest):
    def error(number, *arguments, architecture=architecture):
        return verdict(machine, architecture, number, *arguments)

    assert error(reads) == error(clone, 0x3D0F00) == 0  # a thread's
    assert {error(number) for number in seccomp.refused(machine).values()} == {errno.EPERM}
    for flags in (17, 0x4111, 0x3D0F00 & ~0x400, 0x3D0F00 | 0x10000000):
        assert error(clone, flags) == errno.EPERM
    for number in (*range(newest + 1, 500), 0x40000000 + reads):  # x32
        assert error(number) == errno.ENOSYS
    assert error(reads, architecture=0x40000003) == errno.ENOSYS  # i386


@needs_containment
def test_runs_nothing_without_the_filter(monkeypatch):
    monkeypatch.setattr(seccomp, "program", lambda machine: b"")  # the kernel refuses it
    failure = "SetupError: filtering system calls: Invalid argument"
    assert sandbox.run(RIGHT, TEST, QUICK) == failure
    assert failure in message_of(sandbox.check)
