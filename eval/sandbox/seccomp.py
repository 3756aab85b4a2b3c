"""The system calls that a program in the sandbox may not make, as a filter for the kernel.

A refused call returns EPERM, and a call newer than this table ENOSYS, which libraries take for an
older kernel. The table covers all older calls: a call that is not in it is allowed.
"""

import errno
import struct

MACHINES = ("x86_64", "aarch64")
_AUDIT_ARCHITECTURES = (0xC000003E, 0xC00000B7)
_NEWEST = (334, 294)  # the numbers of the x32 ABI are larger too

# Each call with its numbers on x86_64 and aarch64 (-: has no such call).
_REFUSED = {
    "programs": "fork 57 -, vfork 58 -, execve 59 221, execveat 322 281",
    "memory that outlives its mapping": "memfd_create 319 279, vmsplice 278 75, splice 275 76, "
    "tee 276 77, sendfile 40 71, remap_file_pages 216 234",
    "System V shared memory": "shmget 29 194, shmat 30 196, shmctl 31 195, shmdt 67 197",
    "System V semaphores": "semget 64 190, semop 65 193, semctl 66 191, semtimedop 220 192",
    "System V messages": "msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187",
    "POSIX messages": "mq_open 240 180, mq_unlink 241 181, mq_timedsend 242 182, "
    "mq_timedreceive 243 183, mq_notify 244 184, mq_getsetattr 245 185",
    "asynchronous input and output": "io_setup 206 0, io_destroy 207 1, io_getevents 208 4, "
    "io_submit 209 2, io_cancel 210 3, io_pgetevents 333 292",
    "attributes, whose memory tmpfs does not count": "setxattr 188 5, lsetxattr 189 6, "
    "fsetxattr 190 7",
    "sockets, larger buffers, open files in flight": "socket 41 198, setsockopt 54 208, "
    "sendmsg 46 211, sendmmsg 307 269",
    "other processes": "ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, "
    "kcmp 312 272",
    "namespaces": "unshare 272 97, setns 308 268",
    "file systems": "mount 165 40, umount2 166 39, chroot 161 51, pivot_root 155 41, "
    "name_to_handle_at 303 264, open_by_handle_at 304 265, swapon 167 224, swapoff 168 225, "
    "quotactl 179 60, acct 163 89, sync 162 81, syncfs 306 267",
    "keyrings": "add_key 248 217, request_key 249 218, keyctl 250 219",
    "notification": "inotify_init 253 -, inotify_init1 294 26, inotify_add_watch 254 27, "
    "inotify_rm_watch 255 28, fanotify_init 300 262, fanotify_mark 301 263",
    "programming the kernel": "bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, "
    "seccomp 317 277, init_module 175 105, finit_module 313 273, delete_module 176 106, "
    "kexec_load 246 104, kexec_file_load 320 294",
    "the layout of memory": "mbind 237 235, set_mempolicy 238 237, migrate_pages 256 238, "
    "move_pages 279 239, pkey_mprotect 329 288, pkey_alloc 330 289, pkey_free 331 290, "
    "modify_ldt 154 -, personality 135 92, uselib 134 -",
    "the machine": "syslog 103 116, reboot 169 142, sethostname 170 161, setdomainname 171 162, "
    "settimeofday 164 170, adjtimex 159 171, clock_settime 227 112, clock_adjtime 305 266, "
    "ioprio_set 251 30, iopl 172 -, ioperm 173 -, vhangup 153 58, lookup_dcookie 212 18",
}

_THREAD = 0x10000 | 0x400  # CLONE_THREAD, which shares memory, and CLONE_FILES
_NAMESPACES = 0x7E020080
# (call, its numbers, argument, mask, values): the masked argument must be one of the values.
CONDITIONS = (
    ("clone", (56, 220), 0, _THREAD | _NAMESPACES, (_THREAD,)),
    # MAP_SHARED or MAP_ANONYMOUS: memory that has both stays when all but a page is unmapped.
    ("mmap", (9, 222), 3, 0x21, (0, 0x1, 0x20)),
    # PR_SET_NAME, of a thread. Others allocate memory, or enable huge pages again.
    ("prctl", (157, 167), 0, 0xFFFFFFFF, (15,)),
    # AF_UNIX and SOCK_STREAM, for asyncio and multiprocessing.Pipe.
    ("socketpair", (53, 199), 0, 0xFFFFFFFF, (1,)),
    ("socketpair", (53, 199), 1, 0xF, (1,)),
    # F_DUPFD to F_SETLKW, F_DUPFD_CLOEXEC. Others enlarge pipes, take leases, watch directories.
    ("fcntl", (72, 25), 1, 0xFFFFFFFF, (*range(8), 1030)),
    ("ioctl", (16, 29), 1, 0xFFFFFF00, (0x5400,)),  # of terminals, pipes and descriptors
)

_LOAD, _AND, _EQUAL, _GREATER, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000


def refused(machine: str) -> dict[str, int]:
    """Returns the numbers of the calls that are always refused, by name."""
    column = 1 + MACHINES.index(machine)
    rows = [call.split() for calls in _REFUSED.values() for call in calls.split(", ")]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def program(machine: str) -> bytes:
    """Returns the filter for x86_64 or aarch64: instructions of classic BPF, 8 bytes each."""
    index = MACHINES.index(machine)
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _AUDIT_ARCHITECTURES[index]),  # else the numbers mean other calls
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
        (_LOAD, 0, 0, _NUMBER),
        (_GREATER, 0, 1, _NEWEST[index]),
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
    ]
    for number in refused(machine).values():
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERROR | errno.EPERM)]
    for _, numbers, argument, mask, values in CONDITIONS:
        code += [
            (_EQUAL, 0, len(values) + 4, numbers[index]),
            (_LOAD, 0, 0, _ARGUMENTS + 8 * argument),  # the lower half: both are little-endian
            (_AND, 0, 0, mask),
            *((_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)),
            (_RETURN, 0, 0, _ERROR | errno.EPERM),
            (_LOAD, 0, 0, _NUMBER),
        ]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)
