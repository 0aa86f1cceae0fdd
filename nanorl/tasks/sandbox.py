"""Runs code that a model wrote against tests that the code must not see.

Each run starts three processes:

    supervisor   trusted: keeps the deadline, and at the end kills whatever still runs
    tester       trusted: runs the tests; writes the caller's random secret after the last assertion
    program      not trusted: answers the tester's calls over a pipe, one line of JSON each way

The program cannot reach the verdict. It does not matter what the program prints, overrides or
exits with, or how its objects compare.

The tester gets plain data: None, bool, int, float, complex, str, bytes, list, tuple, dict, set,
frozenset. An object of a subclass arrives as the plain value. The tester sees what a function
returns or raises, and not what the function does to its arguments.

On Linux (x86-64, arm64) the program may use only a list of system calls: those that computing and
reading files take. So it cannot write files, use the network, start processes or threads, or send
signals to others. The list works for every user, in containers too. Under it lie further layers:
limits (time, memory), another user id for root, and namespaces (network, processes) where the
system grants them. A layer that the system does not grant is skipped without a word.

This is a guard and not a jail. It does not stop:
- Reading what the user may read (for root: what everybody may read). Without namespaces this
  includes the trainer's own memory. The standard library must be readable. What the program reads
  it can tell nobody, except by passing or failing.
- A bug in the kernel or in Python's JSON reader.
- On macOS, other processors and old kernels: the network and signals to the user's processes,
  unless there are namespaces; deleting the user's files.
- A program that forks on and on, where root may not change its user id and the machine has neither
  the list of calls nor namespaces (a container on such a machine).
- Memory in total: in each run the program and the tester may each take the limit, so many runs at
  once take many times the limit.

Programs can import only the standard library. Tasks that run a model's code ask for `--allow_code`.
"""

import builtins
import ctypes
import json
import math
import os
import resource
import signal
import struct
import sys
import time
import types
from collections import namedtuple

Result = namedtuple("Result", "passed why")
LAYERS = ("uid", "namespaces", "calls")  # tests take them away, one by one
LONGEST_ANSWER = 1 << 20  # bytes of one answer of the program
MARGIN = 5.0  # seconds after the deadline that the supervisor may take to clean up
TIMEOUT = 124  # the supervisor's exit status; any other is the signal that ended the program
GONE = 3  # the tester's exit status when the program has closed its pipes
REAPED = 1.0  # seconds that a program which has closed its pipes may take to end


def run(program, entry_point, test, helpers="", seconds=10.0, memory=512 << 20, layers=LAYERS):
    """Runs the test on the program -> Result(passed, why).

    program: source, not trusted, that defines the function `entry_point`.
    test: source that defines check(candidate), which asserts (HumanEval's form).
    helpers: source that the test needs, run before it; like the test it is trusted.
    memory: bytes.
    """
    import secrets
    import subprocess
    import tempfile

    secret = secrets.token_hex(16)
    job = json.dumps([secret, program, entry_point, test, helpers]).encode()
    command = [sys.executable, "-I", "-S", __file__]
    command += [repr(float(seconds)), str(int(memory)), ",".join(layers)]

    with tempfile.TemporaryDirectory(prefix="nanorl-", ignore_cleanup_errors=True) as home:
        env = {
            "HOME": home,
            "PATH": os.defpath,
            "LANG": "C.UTF-8",
            # Python itself may need this one.
            "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
        }
        process = subprocess.Popen(
            command,
            cwd=home,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(job, timeout=seconds + MARGIN)
            verdict = output.decode(errors="replace")
        except subprocess.TimeoutExpired:
            verdict = "timeout"
        finally:
            # The supervisor still runs when it hangs, or after Ctrl-C.
            if process.poll() is None:
                _kill(os.killpg, process.pid)
            process.wait()
            process.stdin.close()
            process.stdout.close()

    if verdict == secret:
        return Result(True, "passed")
    if process.returncode == TIMEOUT:
        verdict = "timeout"
    if verdict == "died" and process.returncode > 0:
        verdict += f" (signal {process.returncode})"
    return Result(False, verdict or "no verdict")


def _kill(how, pid):
    try:
        how(pid, signal.SIGKILL)
    except OSError:
        pass


# ---- plain data over the pipe --------------------------------------------------------------------

PLAIN = (str, bytes, list, tuple, dict, set, frozenset)
BY_NAME = {"bytes": bytes, "tuple": tuple, "dict": dict, "set": set, "frozenset": frozenset}


def pack(value):
    """Plain data -> what JSON has; a type that JSON lacks becomes {type: items}.

    Subclasses, and numbers such as NumPy's, become the plain type. Raises TypeError for other data.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [pack(item) for item in value]
    if kind is dict:
        return {"dict": [[pack(k), pack(v)] for k, v in value.items()]}
    if kind in (bytes, tuple, set, frozenset):
        return {kind.__name__: [pack(item) for item in value]}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    import numbers

    for plain in PLAIN:
        if isinstance(value, plain):
            return pack(plain(value))
    if isinstance(value, numbers.Integral):
        return pack(int(value))
    if isinstance(value, numbers.Real):
        return pack(float(value))
    if isinstance(value, numbers.Complex):
        return pack(complex(value))
    raise TypeError(f"a {kind.__name__} is not plain data")


def unpack(data):
    """What pack() returned, after its way through JSON -> the plain data."""
    if type(data) is list:
        return [unpack(item) for item in data]
    if type(data) is dict:
        ((kind, items),) = data.items()
        items = [unpack(item) for item in items]
        if kind == "complex":
            return complex(*items)
        return BY_NAME[kind](items)
    return data


# ---- the tester ----------------------------------------------------------------------------------


class Connection:
    """The tester's ends of the pipes: to the program, from the program, and to the caller."""

    def __init__(self, commands, answers, out):
        self.commands, self.answers, self.out = commands, answers, out

    def say(self, text, status=0):
        """Tells the caller and ends the process: no test goes on after it, whatever it catches."""
        os.write(self.out, text.encode("utf-8", "replace")[:300])
        os._exit(status)

    def ask(self, message):
        """A message to the program -> ("value", value) or ("error", its type's name, its text)."""
        try:
            self.commands.write(json.dumps(message).encode() + b"\n")
            self.commands.flush()
            line = self.answers.readline(LONGEST_ANSWER + 1)
        except BrokenPipeError:
            line = b""

        if not line.endswith(b"\n"):
            if len(line) > LONGEST_ANSWER:
                self.say("answer too long")
            self.say("died", GONE)

        try:
            kind, *value = json.loads(line)
            if kind == "value":
                [data] = value
                return kind, unpack(data)
            if kind == "error":
                name, text = value
                return kind, str(name), str(text)
        except Exception:
            pass
        # The function did not raise this. No test may take it for the exception it expects.
        self.say("garbled answer")


def make_error(name, text):
    """The exception that a test sees: Python's own of that name, or else a plain Exception."""
    general = Exception(f"{name}: {text}")
    kind = getattr(builtins, name, None)
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        return general
    # These two would end a test's loop, as if the loop had seen everything.
    if issubclass(kind, (StopIteration, StopAsyncIteration)):
        return general
    try:
        return kind(text)
    except TypeError:
        # This kind takes more than a text.
        return general


def tester(commands, answers, out):
    """Reads the job, runs the tests and writes the secret, or the reason why not."""
    connection = Connection(commands, answers, out)

    # To the test the program's function looks like any function.
    def candidate(*args, **kwargs):
        kind, *value = connection.ask([pack(args), pack(kwargs)])
        if kind == "value":
            return value[0]
        name, text = value
        raise make_error(name, text)

    try:
        secret, program, entry_point, test, helpers = json.load(sys.stdin)

        # The program's module is loaded first.
        kind, *value = connection.ask([program, entry_point])
        if kind != "value":
            if value[0] in ("SyntaxError", "IndentationError", "TabError"):
                connection.say("syntax error")
            connection.say(f"the program: {': '.join(value)}")

        names = {"__name__": "test"}
        exec(helpers, names)
        # A test may call the function by its name.
        names[entry_point] = candidate
        exec(test, names)
        names["check"](candidate)
    except BaseException as error:
        why = f"wrong: {type(error).__name__}"
        if str(error):
            why += f": {error}"
        connection.say(why)
    connection.say(secret)


# ---- the program ---------------------------------------------------------------------------------


def load(module, program, entry_point):
    exec(program, vars(module))
    if not callable(getattr(module, entry_point, None)):
        raise NameError(f"no function {entry_point}")


def serve(commands, answers):
    """Runs the program, then answers calls of its function until the tester closes the pipe."""

    def answer(function, /, *args, **kwargs):
        try:
            reply = json.dumps(["value", pack(function(*args, **kwargs))])
        except BaseException as error:
            reply = json.dumps(["error", type(error).__name__, str(error)[:200]])
        answers.write(reply.encode() + b"\n")
        answers.flush()

    module = types.ModuleType("program")
    sys.modules["program"] = module
    program, entry_point = json.loads(commands.readline())
    answer(load, module, program, entry_point)
    for line in commands:
        args, kwargs = map(unpack, json.loads(line))
        answer(getattr(module, entry_point), *args, **kwargs)


# ---- what the program may not do -----------------------------------------------------------------

LINUX = sys.platform == "linux"
libc = ctypes.CDLL(None, use_errno=True)
# What prctl sets (linux/prctl.h).
PDEATHSIG, DUMPABLE, SECCOMP, SUBREAPER, NO_NEW_PRIVS = 1, 4, 22, 36, 38
# The kinds of namespaces (linux/sched.h).
NEWUSER, NEWNET, NEWPID, NEWIPC = 0x10000000, 0x40000000, 0x20000000, 0x08000000

# The allowed system calls of each machine and their numbers (Linux's unistd.h): memory, reading,
# time, signals to oneself, leaving. Each run compiles this file anew, and a text compiles faster
# than a dict.
X86_64 = """
    read 0, write 1, close 3, stat 4, fstat 5, lstat 6, poll 7, lseek 8,
    mmap 9, mprotect 10, munmap 11, brk 12, rt_sigaction 13, rt_sigprocmask 14,
    rt_sigreturn 15, pread64 17, readv 19, access 21, select 23, sched_yield 24,
    mremap 25, madvise 28, dup 32, nanosleep 35, getpid 39, exit 60, uname 63,
    getcwd 79, readlink 89, gettimeofday 96, getrusage 98, times 100, getuid 102,
    getgid 104, geteuid 107, getegid 108, getppid 110, sigaltstack 131,
    gettid 186, time 201, futex 202, sched_getaffinity 204, getdents64 217,
    restart_syscall 219, clock_gettime 228, clock_getres 229, clock_nanosleep 230,
    exit_group 231, newfstatat 262, readlinkat 267, faccessat 269, pselect6 270,
    ppoll 271, getrandom 318, statx 332, rseq 334, close_range 436,
    faccessat2 439
"""
AARCH64 = """
    getcwd 17, dup 23, faccessat 48, close 57, getdents64 61, lseek 62,
    read 63, write 64, readv 65, pread64 67, pselect6 72, ppoll 73,
    readlinkat 78, newfstatat 79, fstat 80, exit 93, exit_group 94, futex 98,
    nanosleep 101, clock_gettime 113, clock_getres 114, clock_nanosleep 115,
    sched_getaffinity 123, sched_yield 124, restart_syscall 128, sigaltstack 132,
    rt_sigaction 134, rt_sigprocmask 135, rt_sigreturn 139, times 153, uname 160,
    getrusage 165, gettimeofday 169, getpid 172, getppid 173, getuid 174,
    geteuid 175, getgid 176, getegid 177, gettid 178, brk 214, munmap 215,
    mremap 216, mmap 222, mprotect 226, madvise 233, getrandom 278, statx 291,
    rseq 293, close_range 436, faccessat2 439
"""

# Some calls are allowed only if one argument has no bits but these: open and openat to read only,
# fcntl up to F_GETFL (F_SETOWN sends signals). arm64 has no open.
READ_ONLY = ~(os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) & 0xFFFFFFFF
UP_TO_3 = 3
# By machine: its number in the kernel's audit.h, the allowed calls, and the guarded calls as
# (number, which argument, the bits it may have).
CALLS = {
    "x86_64": (0xC000003E, X86_64, [(2, 1, READ_ONLY), (257, 2, READ_ONLY), (72, 1, UP_TO_3)]),
    "aarch64": (0xC00000B7, AARCH64, [(56, 2, READ_ONLY), (25, 1, UP_TO_3)]),
}

# The kernel's packet-filter language. An instruction is (what, n, m, value): a jump skips n
# instructions if its condition holds, else m.
LOAD = 0x20  # the word at byte `value` of the call: its number, its machine, from 16 its arguments
IF_EQUAL = 0x15  # a jump: the word equals the value
IF_ANY_BIT = 0x45  # a jump: the word has any of the value's bits
RETURN = 0x06  # what the kernel does with the call: one of these two
ALLOW = 0x7FFF0000
REFUSE = 0x00050000 | 38  # with ENOSYS: a C library then tries an older call


def filter_calls():
    """seccomp: the kernel runs a small filter before each call, on its number and arguments."""
    machine = os.uname().machine
    if machine not in CALLS or sys.maxsize < 2**32:
        return
    arch, allowed, guarded = CALLS[machine]

    # The first word read is the machine: another one's calls have other numbers, so all of them are
    # refused. The next word is the call's number.
    code = [(LOAD, 0, 0, 4), (IF_EQUAL, 1, 0, arch), (RETURN, 0, 0, REFUSE), (LOAD, 0, 0, 0)]
    for entry in allowed.split(","):
        _, number = entry.split()
        code += [(IF_EQUAL, 0, 1, int(number)), (RETURN, 0, 0, ALLOW)]
    for number, argument, bits in guarded:
        other_bits = ~bits & 0xFFFFFFFF
        code += [
            (IF_EQUAL, 0, 4, number),
            (LOAD, 0, 0, 16 + 8 * argument),
            (IF_ANY_BIT, 0, 1, other_bits),
            (RETURN, 0, 0, REFUSE),
            (RETURN, 0, 0, ALLOW),
        ]
    code += [(RETURN, 0, 0, REFUSE)]

    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    code_bytes = ctypes.create_string_buffer(packed)
    # The kernel's struct sock_fprog: how many instructions, and where they are.
    header = struct.pack("HP", len(code), ctypes.addressof(code_bytes))
    libc.prctl(SECCOMP, 2, ctypes.create_string_buffer(header), 0, 0)


def drop_user():
    """Root becomes a user that nobody is. Raises OSError where it may not.

    File permissions, rights over processes and the limit on their number then hold for it as for
    others. The standard library may lie where only root can look, so it stays reachable through
    open directories.
    """
    moved = {}
    for path in sys.path:
        if os.path.isdir(path):
            moved[path] = f"/proc/self/fd/{os.open(path, os.O_PATH)}"

    # systemd, too, keeps these numbers for users of the moment.
    uid = 61184 + int.from_bytes(os.urandom(4), "big") % 4336
    os.chown(".", uid, uid)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)

    # Packages that are already loaded look for their submodules in the open directories.
    sys.path[:] = moved.values()
    for module in list(sys.modules.values()):
        if hasattr(module, "__path__"):
            module.__path__ = [move(path, moved) for path in module.__path__]


def move(path, moved):
    for old, new in moved.items():
        if path.startswith(old):
            return new + path[len(old) :]
    return path


def confine(seconds, memory, layers):
    """Limits the process that will run the program.

    The order matters: each step may need what a later one takes away.
    """
    os.setsid()
    if LINUX and "uid" in layers and os.getuid() == 0:
        try:
            drop_user()
        except OSError:
            pass
    limit(
        seconds,
        memory,
        (resource.RLIMIT_NPROC, 1),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_FSIZE, 1 << 20),
    )
    if LINUX:
        # A process has all capabilities in a user namespace of its own. It gives them up.
        libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
        # A change of user id would have cleared this, so it comes after.
        libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
        if "calls" in layers:
            filter_calls()


def limit(seconds, memory, *more):
    """Sets the limits of time and memory, and more as (name, value)."""
    for name, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, math.ceil(seconds) + 1),
        (resource.RLIMIT_AS, memory),
        *more,
    ):
        try:
            resource.setrlimit(name, (value, value))
        except (ValueError, OSError):
            # A stricter limit is in force, or the system has no such limit.
            pass


# ---- the supervisor ------------------------------------------------------------------------------


class Pipe:
    def __init__(self):
        self.reader, self.writer = os.pipe()


def supervise(seconds, memory, layers):
    """Starts the tester and the program, waits, cleans up and exits; it does not return.

    The exit status is TIMEOUT, or the number of the signal that ended the program, or 0.
    """
    deadline = time.monotonic() + seconds
    caller = os.getppid()
    if LINUX:
        # No process of the same user may read this one's memory or the tester's, or open their
        # pipes.
        libc.prctl(DUMPABLE, 0, 0, 0, 0)
        # Processes that the program leaves behind become the supervisor's children.
        libc.prctl(SUBREAPER, 1, 0, 0, 0)
    null = os.open(os.devnull, os.O_RDWR)
    commands = Pipe()  # from the tester to the program
    answers = Pipe()  # from the program to the tester

    trusted = child(run_tester, null, commands, answers, seconds, memory)
    # The job and the verdict are the tester's alone.
    for fd in (0, 1):
        os.dup2(null, fd)
    if LINUX and "namespaces" in layers:
        enter_namespaces()
    program = child(run_program, null, commands, answers, seconds, memory, layers)
    for fd in (commands.reader, commands.writer, answers.reader, answers.writer):
        os.close(fd)

    status, late = wait_for_tester(trusted, caller, deadline)
    # A program that dies closes its pipes a moment before one can ask what it died of.
    patience = REAPED if os.waitstatus_to_exitcode(status) == GONE else 0.0
    status = end_program(program, patience)
    end_descendants()
    try:
        # The caller removes this folder too, but it may be dead.
        os.rmdir(os.environ["HOME"])
    except OSError:
        pass
    os._exit(TIMEOUT if late else os.WTERMSIG(status))


def child(function, *args):
    """fork -> pid of a process that runs this function and nothing else."""
    pid = os.fork()
    if pid == 0:
        try:
            function(*args)
        finally:
            os._exit(1)
    return pid


def run_tester(null, commands, answers, seconds, memory):
    """The tester's process."""
    os.close(commands.reader)
    os.close(answers.writer)
    if LINUX:
        libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    limit(seconds, memory)
    # What the test prints does not reach the caller: only the verdict does.
    out = os.dup(1)
    os.dup2(null, 1)
    tester(os.fdopen(commands.writer, "wb"), os.fdopen(answers.reader, "rb"), out)


def run_program(null, commands, answers, seconds, memory, layers):
    """The program's process."""
    for fd in (null, commands.writer, answers.reader):
        os.close(fd)
    confine(seconds, memory, layers)
    serve(os.fdopen(commands.reader, "rb"), os.fdopen(answers.writer, "wb"))


def enter_namespaces():
    """New namespaces for the process that is forked next, as far as the system grants them."""
    if os.getuid() != 0:
        # It permits users other than root to make the rest.
        libc.unshare(NEWUSER)
    for kind in (NEWNET, NEWPID, NEWIPC):
        libc.unshare(kind)


def wait_for_tester(pid, caller, deadline):
    """-> (the tester's wait status, whether the deadline passed). Kills it if it has not ended."""
    ended, status, late = 0, 0, False
    # A caller that has been killed is no longer the parent.
    while not ended and os.getppid() == caller:
        late = time.monotonic() > deadline
        if late:
            break
        time.sleep(0.003)
        ended, status = os.waitpid(pid, os.WNOHANG)
    if not ended:
        _kill(os.kill, pid)
    return status, late


def end_program(program, patience):
    """-> the program's wait status, 0 if it has to be killed after `patience` seconds."""
    until = time.monotonic() + patience
    pid, status = os.waitpid(program, os.WNOHANG)
    while pid == 0 and time.monotonic() < until:
        time.sleep(0.001)
        pid, status = os.waitpid(program, os.WNOHANG)
    if pid == 0:
        # It is not yet waited for, so the number is still its own.
        _kill(os.killpg, program)
        # The first process of its namespace takes the others with it.
        _kill(os.kill, program)
    return status


def end_descendants():
    """Kills the descendants again and again, until the last has been waited for."""
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            break
        for pid in descendants():
            _kill(os.kill, pid)
        time.sleep(0.001)


def descendants():
    """-> the pids of this process's children, their children and so on (none but on Linux)."""
    children = {}  # of each parent
    names = os.listdir("/proc") if LINUX else ()
    for name in filter(str.isdigit, names):
        try:
            with open(f"/proc/{name}/stat", errors="replace") as f:
                stat = f.read()
        except OSError:
            # It has just ended.
            continue
        # "pid (command) state parent ...", where a command may contain blanks and brackets.
        _, _, fields = stat.rpartition(")")
        parent = int(fields.split()[1])
        children.setdefault(parent, []).append(int(name))

    # The list grows while the loop goes over it.
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


if __name__ == "__main__":
    supervise(float(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(","))
