"""The process that contains and runs one untrusted program; only `eval.sandbox` starts it.

The argument is the file descriptor for the result. stdin holds a JSON request: {"token", "program",
"limits", "readable", "filter"}. The program's output goes to stdout and stderr. The result is the
token if the program ran to its end, else what stopped the program. Exit code 0 says nothing about
the program. Exit code 3 means that the sandbox could not be made; the result then says why.

The kernel contains the program, without root:
- new namespaces: user (no privilege outside), mount (a new root on a small tmpfs, with the
  interpreter's directories read-only), pid (the program sees and signals only its own processes,
  which all die with the first), network (no interface is up), IPC and host name;
- resource limits: memory, CPU time, file size, threads, open files;
- no capabilities, and no way to gain one;
- a filter of system calls (`seccomp.py`): the program cannot start a process, so that limits of a
  process are limits of the program, and cannot get memory that they do not count.

One process with an address space of A bounds all memory without a control group, which takes
privileges, and without a process that watches, which a fast program outruns. A page of address
space costs at most three (itself, and page tables if it lies far from others): 3 A, the files in
/tmp and 32 pipes of 1 MiB stay under 1 GiB.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import types
from collections.abc import Callable

RESULT = int(sys.argv[1])
SETUP_FAILED = 3
INSIDE_ID = 1000
NOBODY = 65534

_NEWNS, _NEWUTS, _NEWIPC = 0x20000, 0x4000000, 0x8000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
_MNT_DETACH = 2
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_MOUNT_SETATTR = 442
_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
_AT_FDCWD, _AT_RECURSIVE, _ATTR_READ_ONLY, _ATTR_NOSUID = -100, 0x8000, 1, 2
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
_PR_SET_THP_DISABLE = 41

libc = ctypes.CDLL(None, use_errno=True)


class _FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


class SetupError(Exception):
    """Raised if the kernel refuses a part of the sandbox."""


def call(what: str, function: Callable[..., int], *arguments: object) -> None:
    """Calls a function of libc that must not fail."""
    arguments = [a.encode() if isinstance(a, str) else a for a in arguments]
    if function(*arguments) != 0:
        raise SetupError(f"{what}: {os.strerror(ctypes.get_errno())}")


def syscall(what: str, number: int, *arguments: object) -> None:
    """Makes a system call that libc has no function for and that must not fail."""
    call(what, lambda *rest: libc.syscall(ctypes.c_long(number), *rest), *arguments)


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent ends."""
    call("prctl", libc.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main() -> None:
    """Reads the request, and runs the program in the sandbox."""
    request = json.load(sys.stdin.buffer)
    try:
        die_with_parent()
        status = in_new_namespaces(lambda: become_sandbox(request))
    except (SetupError, OSError) as error:
        fail(error)
    sys.exit(SETUP_FAILED if status else 0)


def fail(error: Exception) -> None:
    """Reports a failed setup, and ends this process."""
    os.write(RESULT, str(error).encode())
    os._exit(SETUP_FAILED)


def in_new_namespaces(body: Callable[[], None]) -> int:
    """Runs `body` in a child with new namespaces. Returns the child's exit status.

    This process writes the child's user map. Root can also map the user nobody: the program then
    runs as nobody, since root is exempt from the limit on processes.
    """
    ready_read, ready_write = os.pipe()
    mapped_read, mapped_write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            die_with_parent()
            namespaces = _NEWUSER | _NEWNS | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS
            call("creating namespaces", libc.unshare, namespaces)
            os.write(ready_write, b"1")
            os.read(mapped_read, 1)
            body()
        except (SetupError, OSError) as error:
            fail(error)
        os._exit(0)
    os.close(ready_write)
    if os.read(ready_read, 1):
        write(f"/proc/{child}/setgroups", "deny")
        for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
            as_root = f"0 0 1\n{INSIDE_ID} {NOBODY} 1\n"
            as_user = f"{INSIDE_ID} {own} 1\n"
            write(f"/proc/{child}/{kind}_map", as_user if os.geteuid() else as_root)
        os.write(mapped_write, b"1")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def become_sandbox(request: dict) -> None:
    """Forks the first process of the new pid namespace, which supervises the program."""
    first = os.fork()
    if first == 0:
        try:
            new_root(request["readable"], request["limits"]["tmp_bytes"])
            drop_privileges()
            die_with_parent()  # again: the change of user undid the first request
            set_limits(request["limits"])
            program = os.fork()
            if program == 0:
                run_program(request)
            status = os.waitpid(program, 0)[1]
            if os.WIFSIGNALED(status):  # SIGKILL: the CPU time is over
                os.write(RESULT, f"ended by {signal.Signals(os.WTERMSIG(status)).name}".encode())
        except (SetupError, OSError) as error:
            fail(error)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == SETUP_FAILED:
        os._exit(SETUP_FAILED)


def new_root(readable: list[str], tmp_bytes: int) -> None:
    """Makes a root with the readable directories, three devices and an empty, writable /tmp."""
    root = "/tmp"  # covered by the new root in this namespace only
    call("making mounts private", libc.mount, None, "/", None, _MS_REC | _MS_PRIVATE, None)
    # Not /dev/zero: what is mapped from it and shared stays when all but a page is unmapped.
    devices = [f"/dev/{name}" for name in ("null", "random", "urandom")]
    kept = {path: os.open(path, os.O_PATH) for path in (*devices, *readable)}
    for path in (root, f"{root}/tmp"):
        os.makedirs(path, exist_ok=True)
        size = f"size={tmp_bytes},nr_inodes=1024,mode={777 if path != root else 755}"
        call("mounting tmpfs", libc.mount, "tmpfs", path, "tmpfs", _MS_NOSUID | _MS_NODEV, size)
    for path, descriptor in kept.items():
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if path in devices:
            os.close(os.open(target, os.O_CREAT))
        else:
            os.mkdir(target)
        source = f"/proc/self/fd/{descriptor}"
        call(f"binding {path}", libc.mount, source, target, None, _MS_BIND | _MS_REC, None)
        os.close(descriptor)
    for path in ("/bin", "/lib", "/lib64"):
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
    os.chdir(root)
    syscall("changing the root directory", _SYS_PIVOT_ROOT[os.uname().machine], b".", b".")
    call("leaving the old root directory", libc.umount2, b".", _MNT_DETACH)
    os.chdir("/tmp")
    set_mount(b"/", _AT_RECURSIVE, add=_ATTR_READ_ONLY | _ATTR_NOSUID)
    set_mount(b"/tmp", 0, clear=_ATTR_READ_ONLY)


def set_mount(path: bytes, flags: int, add: int = 0, clear: int = 0) -> None:
    """Calls mount_setattr(2), which unlike a remount makes a whole tree of mounts read-only."""
    attributes = (ctypes.c_uint64 * 4)(add, clear, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    pointer = ctypes.byref(attributes)
    syscall("making mounts read-only", _SYS_MOUNT_SETATTR, _AT_FDCWD, path, flags, pointer, size)


def drop_privileges() -> None:
    """Drops all capabilities and every way to gain one; root outside becomes nobody."""
    for capability in range(64):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails if the kernel has no such one
    os.setresgid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
    os.setresuid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    none = (ctypes.c_uint32 * 6)()
    number = _SYS_CAPSET[os.uname().machine]
    syscall("dropping capabilities", number, ctypes.byref(header), ctypes.byref(none))
    call("prctl", libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def set_limits(limits: dict[str, int]) -> None:
    """Sets the resource limits of this process and of the program."""
    values = {
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_FSIZE: limits["tmp_bytes"],
        resource.RLIMIT_NPROC: limits["threads"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_SIGPENDING: 64,  # timers too
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in values.items():
        resource.setrlimit(kind, (value, value))


def filter_calls(instructions: bytes) -> None:
    """Makes the kernel refuse the system calls that `seccomp.py` names."""
    # A huge page stays as long as any of its pages is mapped; the limit counts what is mapped.
    call("disabling huge pages", libc.prctl, _PR_SET_THP_DISABLE, 1, 0, 0, 0)
    program = ctypes.byref(_FilterProgram(len(instructions) // 8, instructions))
    call("filtering system calls", libc.prctl, _PR_SET_SECCOMP, 2, program, 0, 0)


def run_program(request: dict) -> None:
    """Runs the program as a module, writes the result, and ends this process."""
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        signal.setitimer(signal.ITIMER_REAL, request["limits"]["program_seconds"])
        filter_calls(bytes.fromhex(request["filter"]))
        exec(compile(request["program"], "program.py", "exec"), module.__dict__)
        result = request["token"]
    except BaseException as error:  # SystemExit too: the tests were not reached
        result = f"{type(error).__name__}: {error}"[:300]
    os.write(RESULT, result.encode("utf-8", "replace"))
    os._exit(0)


def write(path: str, text: str) -> None:
    """Writes a file of /proc."""
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError as error:
        raise SetupError(f"writing {path}: {error.strerror}") from None


if __name__ == "__main__":
    main()
