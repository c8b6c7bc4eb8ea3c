"""What the Linux kernel is asked to deny this process: Landlock for files, seccomp for system calls, no capabilities.

Stands alone (standard library only) and is loaded by path inside the sandbox; the parent asks `landlock_abi()` too.
Sources: Documentation/userspace-api/landlock.rst and seccomp_filter.rst of the kernel, asm/unistd.h for the numbers.
"""

import ctypes
import os

_LIBC = ctypes.CDLL(None, use_errno=True)

# -- Landlock ---------------------------------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
READ_FILE, READ_DIR = 1 << 2, 1 << 3
_WRITE_FILE, _REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG, _MAKE_SYM = (
    1 << 1,
    1 << 4,
    1 << 5,
    1 << 7,
    1 << 8,
    1 << 12,
)
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_OWN_FOLDER = READ_FILE | READ_DIR | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SYM
_OWN_FOLDER |= _REFER | _TRUNCATE  # no device, socket or pipe is made, nothing is executed


class _Ruleset(ctypes.Structure):
    _fields_ = [("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"  # required beside _pack_ from Python 3.14 on
    _fields_ = [("allowed", ctypes.c_uint64), ("fd", ctypes.c_int32)]


def landlock_abi() -> int:
    """The kernel's Landlock version; 0 where it has none."""
    return max(0, int(_LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))))


def handled_files(abi: int) -> int:
    """The bits of all file accesses that this version can deny."""
    return (1 << (16 if abi >= 5 else 15 if abi >= 3 else 14 if abi >= 2 else 13)) - 1


def restrict_files(abi: int, readable: dict[str, int], own_folder: str) -> None:
    """Deny all files but `readable` {path: access bits} and `own_folder`, and TCP and foreign processes where known."""
    handled = handled_files(abi)
    rules = _Ruleset(handled, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _checked("landlock_create_ruleset", _LIBC.syscall(_CREATE_RULESET, ctypes.byref(rules), size, 0))
    for path, access in {**readable, own_folder: _OWN_FOLDER & handled}.items():
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # a dangling link of the system; what is not allowed stays denied
        rule = _PathBeneath(access, opened)
        _checked("landlock_add_rule", _LIBC.syscall(_ADD_RULE, ruleset, 1, ctypes.byref(rule), 0))
        os.close(opened)
    _checked("no_new_privs", _LIBC.prctl(38, 1, 0, 0, 0))
    _checked("landlock_restrict_self", _LIBC.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _checked(what: str, result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies."""
    _checked("prctl", _LIBC.prctl(1, 9, 0, 0, 0))


def drop_capabilities() -> None:
    """Give up what root may do; for everybody else nothing changes."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    _checked("capset", _LIBC.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)())))


# -- seccomp ----------------------------------------------------------------------------------------------------------

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # audit number, column of the tables below
# (x86_64, aarch64); None: the architecture does not have it
DENIED = {
    # network; socketpair is judged below
    "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "bind": (49, 200), "listen": (50, 201),
    "accept4": (288, 242),
    # other processes
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "kcmp": (312, 272), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "setpgid": (109, 154), "setsid": (112, 157), "setpriority": (141, 140),
    "ioprio_set": (251, 30), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122), "sched_setattr": (314, 274), "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # memory that no limit counts, and shared with other programs
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192),
    "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    # changes that Landlock does not see: modes, owners, times and attributes of any file
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469), "inotify_init": (253, None),
    "inotify_init1": (294, 26), "inotify_add_watch": (254, 27), "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "statmount": (457, 457), "listmount": (458, 458), "open_tree_attr": (467, 467), "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    # the kernel itself
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "acct": (163, 89), "syslog": (103, 116), "vhangup": (153, 58), "sethostname": (170, 161),
    "setdomainname": (171, 162), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "personality": (135, 92), "iopl": (172, None), "ioperm": (173, None),
}  # fmt: skip
JUDGED = {
    "clone": (56, 220), "clone3": (435, 435), "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261),
    "socketpair": (53, 199), "prctl": (157, 167), "ioctl": (16, 29), "truncate": (76, 45),
}  # fmt: skip
_EPERM, _ENOSYS = 1, 38
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06  # BPF_LD|W|ABS, BPF_ALU|AND|K, BPF_RET|K
_EQUAL, _AT_LEAST, _ANY_BIT = 0x15, 0x35, 0x45  # BPF_JMP with JEQ, JGE, JSET
_CLONE_THREAD = 0x10000
# what terminals, pipes and descriptors are asked in normal use: TCGETS(2), TIOCGWINSZ, FIONREAD, FIONBIO, FIO(N)CLEX
_IOCTLS = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, value


def filter_program(machine: str, pid: int, abi: int) -> list[Instruction]:
    """The BPF program for this machine: everything is allowed but what the tables deny."""
    audit_number, column = ARCHITECTURES[machine]
    deny = (_RETURN, 0, 0, _ERRNO | _EPERM)
    program: list[Instruction] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, audit_number),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
    ]
    if machine == "x86_64":
        program += [(_AT_LEAST, 0, 1, 0x40000000), deny]  # the x32 ABI has numbers of its own
    judgements: dict[str, list[Instruction]] = {
        "clone": [(_LOAD, 0, 0, _argument(0)), (_ANY_BIT, 1, 0, _CLONE_THREAD)],  # threads yes, processes no
        "clone3": [(_RETURN, 0, 0, _ERRNO | _ENOSYS)],  # its flags are in memory, unseen; libc falls back to clone
        "kill": _one_of(0, (pid,)),
        "tgkill": _one_of(0, (pid,)),
        "prlimit64": _one_of(0, (0, pid)),
        # only a connected pair for this process itself, as asyncio needs it: a datagram could be sent to any name
        "socketpair": [
            (_LOAD, 0, 0, _argument(0)), (_EQUAL, 1, 0, 1), deny,
            (_LOAD, 0, 0, _argument(1)), (_AND, 0, 0, 0xF), (_EQUAL, 1, 0, 1),
        ],
        "prctl": [(_LOAD, 0, 0, _argument(0)), (_EQUAL, 0, 1, 1)],  # dying with the parent stays
        "ioctl": _one_of(1, _IOCTLS),
    }  # fmt: skip
    if abi < 3:
        judgements["truncate"] = []  # Landlock does not see it yet
    for name, judgement in judgements.items():
        block = judgement if name == "clone3" else [*judgement, deny, (_RETURN, 0, 0, _ALLOW)]
        program += [(_EQUAL, 0, len(block), JUDGED[name][column]), *block]
    for numbers in DENIED.values():
        if (number := numbers[column]) is not None:
            program += [(_EQUAL, 0, 1, number), deny]
    return [*program, (_RETURN, 0, 0, _ALLOW)]


def _argument(index: int) -> int:
    return 16 + 8 * index  # the low half: both architectures are little-endian


def _one_of(index: int, values: tuple[int, ...]) -> list[Instruction]:
    """Skip the denial that follows when the argument is one of `values`."""
    tests: list[Instruction] = [(_EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
    return [(_LOAD, 0, 0, _argument(index)), *tests]


class _Filter(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("filter", ctypes.POINTER(_Filter))]


def restrict_calls(abi: int) -> None:
    """Install the filter for this process and every thread it starts; needs no_new_privs."""
    program = filter_program(os.uname().machine, os.getpid(), abi)
    array = (_Filter * len(program))(*(_Filter(*instruction) for instruction in program))
    _checked("seccomp", _LIBC.prctl(22, 2, ctypes.byref(_Program(len(program), array)), 0, 0))
