"""Runs code that a model wrote against tests that it must not see. Three processes, all of them started for one run:

    supervisor   trusted: keeps the deadline, and kills whatever is left at the end
    tester       trusted: runs the tests; says the caller's random secret once the last assertion held
    program      not trusted: answers the tester's calls over a pipe, one line of JSON each way

So the verdict is never where the program could reach it: what it prints, overrides or exits with, and how its objects compare, does not matter. The tester
gets plain data: None, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, and of a subclass the plain value. It sees what a
function returns or raises, not what it does to its arguments.

On Linux (x86-64, arm64) the program is under a list of the system calls that computing and reading files take: no writing, no network, no processes or
threads, no signals to others. It works for everyone, in containers too. Below that lie limits (time, memory), for root another user id, and where the
system gives them namespaces (network, processes). What cannot be had is silently left out.

A guard, not a jail. It does not stop:
- reading what the user may read (for root: what everybody may), the trainer's own memory included where there are no namespaces. The standard library
  must be readable; and the program can tell nobody, except by passing or failing
- a bug in the kernel or in Python's JSON reader
- on macOS, other processors and old kernels: the network and signals to the user's processes, unless there are namespaces; deleting the user's files
- where root may not change its user id, and has neither that list nor namespaces (a container on such a machine): a program that forks on and on
- memory in all: each run's program and tester may each take the limit, so many at once take many times it
Only the standard library can be imported, and tasks that run a model's code ask for `--allow_code`."""

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
ANSWER = 1 << 20  # bytes that one answer of the program may have
MARGIN = 5.0  # seconds after the deadline that the supervisor may take to clean up
TIMEOUT = 124  # the supervisor's exit status; others are the signal that ended the program
GONE = 3  # the tester's exit status when the program has closed its pipes
REAPED = 1.0  # seconds that a program which has closed its pipes may take to end


def run(program, entry_point, test, helpers="", seconds=10.0, memory=512 << 20, layers=LAYERS):
    """-> Result(passed, why). program: source, not trusted, that defines the function `entry_point`. test: source that defines check(candidate), which
    asserts (HumanEval's form). helpers: source that the test needs, run before it; like the test it is trusted. memory: bytes."""
    import secrets
    import subprocess
    import tempfile

    secret = secrets.token_hex(16)
    job = json.dumps([secret, program, entry_point, test, helpers]).encode()
    with tempfile.TemporaryDirectory(prefix="nanorl-", ignore_cleanup_errors=True) as home:
        env = {
            "HOME": home,
            "PATH": os.defpath,
            "LANG": "C.UTF-8",
            "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
        }  # Python itself may need the last
        process = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                __file__,
                repr(float(seconds)),
                str(int(memory)),
                ",".join(layers),
            ],
            cwd=home,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            said = process.communicate(job, timeout=seconds + MARGIN)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            said = "timeout"
        finally:
            if process.poll() is None:  # the last resort, and Ctrl-C
                _kill(os.killpg, process.pid)
            process.wait()
            process.stdin.close()
            process.stdout.close()
    if said == secret:
        return Result(True, "passed")
    if process.returncode == TIMEOUT:
        said = "timeout"
    return Result(
        False,
        said + f" (signal {process.returncode})" * (said == "died" and process.returncode > 0)
        or "no verdict",
    )


def _kill(how, pid):
    try:
        how(pid, signal.SIGKILL)
    except OSError:
        pass


# ---- plain data over the pipe ----------------------------------------------------------------------------------

PLAIN = (str, bytes, list, tuple, dict, set, frozenset)


def pack(value):
    """Plain data -> what JSON has: the other types become {type: items}. Subclasses, and numbers such as NumPy's, become the plain type."""
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

    for base, plain in [
        *zip(PLAIN, PLAIN),
        (numbers.Integral, int),
        (numbers.Real, float),
        (numbers.Complex, complex),
    ]:
        if isinstance(value, base):
            return pack(plain(value))
    raise TypeError(f"a {kind.__name__} is not plain data")


def unpack(data):
    if type(data) is list:
        return [unpack(item) for item in data]
    if type(data) is dict:
        ((kind, items),) = data.items()
        items = [unpack(item) for item in items]
        return (
            complex(*items)
            if kind == "complex"
            else {"bytes": bytes, "tuple": tuple, "dict": dict, "set": set, "frozenset": frozenset}[
                kind
            ](items)
        )
    return data


# ---- the tester ------------------------------------------------------------------------------------------------


def tester(commands, answers, out):
    """Reads the job, runs the tests and writes the secret, or why it does not."""

    def say(text, status=0):  # and the test cannot go on, whatever it catches
        os.write(out, text.encode("utf-8", "replace")[:300])
        os._exit(status)

    def ask(message):
        try:
            commands.write(json.dumps(message).encode() + b"\n")
            commands.flush()
            line = answers.readline(ANSWER + 1)
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            if len(line) > ANSWER:
                say("answer too long")
            say("died", GONE)
        try:
            kind, *value = json.loads(line)
            return (kind, *map(unpack, value)) if kind == "value" else (kind, *map(str, value))
        except (
            Exception
        ):  # not from the function: no test may take it for the exception that it expects
            say("garbled answer")

    def candidate(*args, **kwargs):
        kind, *value = ask([pack(args), pack(kwargs)])
        if kind == "value":
            return value[0]
        name, text = value
        error = getattr(builtins, name, None)
        try:
            plain = (
                isinstance(error, type)
                and issubclass(error, Exception)
                and not issubclass(error, (StopIteration, StopAsyncIteration))
            )  # those end a test's loop
            error = error(text) if plain else None
        except TypeError:  # it takes more than a text
            error = None
        raise error or Exception(f"{name}: {text}")

    try:
        secret, program, entry_point, test, helpers = json.load(sys.stdin)
        kind, *value = ask([program, entry_point])
        if kind != "value":
            say(
                "syntax error"
                if value[0] in ("SyntaxError", "IndentationError", "TabError")
                else f"the program: {': '.join(value)}"
            )
        names = {"__name__": "test"}
        exec(helpers, names)
        names[entry_point] = candidate  # a test may call it by its name
        exec(test, names)
        names["check"](candidate)
    except BaseException as error:
        say(f"wrong: {type(error).__name__}" + f": {error}" * bool(str(error)))
    say(secret)


# ---- the program -----------------------------------------------------------------------------------------------


def serve(commands, answers):
    """Runs the program, then answers calls of its function."""

    def answer(function, *args, **kwargs):
        try:
            reply = json.dumps(["value", pack(function(*args, **kwargs))])
        except BaseException as error:
            reply = json.dumps(["error", type(error).__name__, str(error)[:200]])
        answers.write(reply.encode() + b"\n")
        answers.flush()

    def load(program, entry_point):
        exec(program, vars(module))
        if not callable(getattr(module, entry_point, None)):
            raise NameError(f"no function {entry_point}")

    module = sys.modules["program"] = types.ModuleType("program")
    program, entry_point = json.loads(commands.readline())
    answer(load, program, entry_point)
    for line in commands:
        args, kwargs = map(unpack, json.loads(line))
        answer(getattr(module, entry_point), *args, **kwargs)


# ---- what the program may not do -------------------------------------------------------------------------------

LINUX = sys.platform == "linux"
libc = ctypes.CDLL(None, use_errno=True)
PDEATHSIG, DUMPABLE, SECCOMP, SUBREAPER, NO_NEW_PRIVS = 1, 4, 22, 36, 38  # prctl's names for them
NEWUSER, NEWNET, NEWPID, NEWIPC = 0x10000000, 0x40000000, 0x20000000, 0x08000000
# By machine: its number in the kernel's audit.h; the calls allowed, by number (Linux's unistd.h): memory, reading, time, signals to oneself, leaving;
# and calls allowed without certain bits in an argument: open and openat to read only, fcntl up to F_GETFL (F_SETOWN sends signals).
READ_ONLY, UP_TO_3 = ~(os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) & 0xFFFFFFFF, 3
CALLS = {
    "x86_64": (
        0xC000003E,
        [
            0,
            1,
            3,
            4,
            5,
            6,
            7,
            8,
            9,
            10,
            11,
            12,
            13,
            14,
            15,
            17,
            19,
            21,
            23,
            24,
            25,
            28,
            32,
            35,
            39,
            60,
            63,
            79,
            89,
            96,
            98,
            100,
            102,
            104,
            107,
            108,
            110,
            131,
            186,
            201,
            202,
            204,
            217,
            219,
            228,
            229,
            230,
            231,
            262,
            267,
            269,
            270,
            271,
            318,
            332,
            334,
            436,
            439,
        ],
        [(2, 1, READ_ONLY), (257, 2, READ_ONLY), (72, 1, UP_TO_3)],
    ),
    "aarch64": (
        0xC00000B7,
        [
            17,
            23,
            48,
            57,
            61,
            62,
            63,
            64,
            65,
            67,
            72,
            73,
            78,
            79,
            80,
            93,
            94,
            98,
            101,
            113,
            114,
            115,
            123,
            124,
            128,
            132,
            134,
            135,
            139,
            153,
            160,
            165,
            169,
            172,
            173,
            174,
            175,
            176,
            177,
            178,
            214,
            215,
            216,
            222,
            226,
            233,
            278,
            291,
            293,
            436,
            439,
        ],
        [(56, 2, READ_ONLY), (25, 1, UP_TO_3)],
    ),
}


def filter_calls():
    """seccomp: a program in the kernel's packet-filter language, which sees the number of each call and its arguments."""
    if os.uname().machine not in CALLS or sys.maxsize < 2**32:
        return
    arch, allowed, guarded = CALLS[os.uname().machine]
    load, equal, has_bits, give = (
        0x20,
        0x15,
        0x45,
        0x06,
    )  # load a word, jump if equal, jump if any bit is set, return
    allow, refuse = (
        0x7FFF0000,
        0x00050000 | 38,
    )  # refused with ENOSYS: a C library then tries an older call
    code = [(load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, refuse), (load, 0, 0, 0)]
    for number in allowed:
        code += [(equal, 0, 1, number), (give, 0, 0, allow)]
    for number, argument, bits in guarded:
        code += [
            (equal, 0, 4, number),
            (load, 0, 0, 16 + 8 * argument),
            (has_bits, 0, 1, ~bits & 0xFFFFFFFF),
            (give, 0, 0, refuse),
            (give, 0, 0, allow),
        ]
    code += [(give, 0, 0, refuse)]
    code_bytes = ctypes.create_string_buffer(
        b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    )
    libc.prctl(
        SECCOMP,
        2,
        ctypes.create_string_buffer(struct.pack("HP", len(code), ctypes.addressof(code_bytes))),
        0,
        0,
    )


def drop_user():
    """Root becomes a user nobody is, so that files, processes and the limit on processes hold for it as for others. Raises OSError where it may not.
    The standard library, which may lie where only root can look, stays at hand through open directories."""
    moved = {
        path: f"/proc/self/fd/{os.open(path, os.O_PATH)}"
        for path in sys.path
        if os.path.isdir(path)
    }
    uid = (
        61184 + int.from_bytes(os.urandom(4), "big") % 4336
    )  # the numbers that systemd, too, keeps for users of the moment
    os.chown(".", uid, uid)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    sys.path[:] = moved.values()
    for module in list(sys.modules.values()):
        if hasattr(module, "__path__"):
            module.__path__ = [
                next(
                    (new + path[len(old) :] for old, new in moved.items() if path.startswith(old)),
                    path,
                )
                for path in module.__path__
            ]


def confine(seconds, memory, layers):
    """The limits of the process that runs the program. The order matters: each step may need what a later one takes away."""
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
        libc.capset(
            struct.pack("Ii", 0x20080522, 0), bytes(24)
        )  # in a user namespace of one's own one has all capabilities
        libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a change of user id would have cleared it
        libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
        if "calls" in layers:
            filter_calls()


def limit(seconds, memory, *more):
    for name, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, math.ceil(seconds) + 1),
        (resource.RLIMIT_AS, memory),
        *more,
    ):
        try:
            resource.setrlimit(name, (value, value))
        except (ValueError, OSError):  # a stricter one is in force, or the system has none
            pass


# ---- the supervisor --------------------------------------------------------------------------------------------


def child(function):
    """fork -> pid of a process that does this and nothing else."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(1)
    return pid


def supervise(seconds, memory, layers):
    deadline, caller = time.monotonic() + seconds, os.getppid()
    if LINUX:
        libc.prctl(
            DUMPABLE, 0, 0, 0, 0
        )  # nobody of the same user may read its memory or the tester's, nor open its pipes
        libc.prctl(
            SUBREAPER, 1, 0, 0, 0
        )  # processes that the program leaves behind become its children
    null = os.open(os.devnull, os.O_RDWR)
    (to_program, from_tester), (to_tester, from_program) = os.pipe(), os.pipe()

    def test():
        os.close(to_program)
        os.close(from_program)
        if LINUX:
            libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        limit(seconds, memory)
        out = os.dup(1)
        os.dup2(null, 1)
        tester(os.fdopen(from_tester, "wb"), os.fdopen(to_tester, "rb"), out)

    def untrusted():
        for fd in (null, from_tester, to_tester):
            os.close(fd)
        confine(seconds, memory, layers)
        serve(os.fdopen(to_program, "rb"), os.fdopen(from_program, "wb"))

    trusted = child(test)
    for fd in (0, 1):  # the job and the verdict: the tester's alone
        os.dup2(null, fd)
    if LINUX and "namespaces" in layers:
        for kind in (NEWUSER,) * (os.getuid() != 0) + (
            NEWNET,
            NEWPID,
            NEWIPC,
        ):  # a new user namespace is what permits others to make the rest
            libc.unshare(kind)
    program = child(untrusted)
    for fd in (to_program, from_tester, to_tester, from_program):
        os.close(fd)
    late, ended, status = False, 0, 0
    while not ended and os.getppid() == caller:  # or the caller has been killed
        if late := time.monotonic() > deadline:
            break
        time.sleep(0.003)
        ended, status = os.waitpid(trusted, os.WNOHANG)
    if not ended:
        _kill(os.kill, trusted)

    # A program that dies closes its pipes a moment before one can ask what it died of.
    patience = REAPED if os.waitstatus_to_exitcode(status) == GONE else 0.0
    until = time.monotonic() + patience
    pid, status = os.waitpid(program, os.WNOHANG)
    while pid == 0 and time.monotonic() < until:
        time.sleep(0.001)
        pid, status = os.waitpid(program, os.WNOHANG)
    if pid == 0:  # not yet waited for, so the number is still its own
        _kill(os.killpg, program)
        _kill(os.kill, program)  # the first process of its namespace takes the others with it
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            break
        for pid in descendants():
            _kill(os.kill, pid)
        time.sleep(0.001)
    try:
        os.rmdir(os.environ["HOME"])  # the caller does it; but it may be dead
    except OSError:
        pass
    os._exit(TIMEOUT if late else os.WTERMSIG(status))


def descendants():
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc") if LINUX else ()):
        try:
            with open(f"/proc/{name}/stat", errors="replace") as f:
                parents.setdefault(int(f.read().rpartition(")")[2].split()[1]), []).append(
                    int(name)
                )
        except OSError:  # it has just ended
            pass
    found = [os.getpid()]
    for pid in found:
        found += parents.get(pid, [])
    return found[1:]


if __name__ == "__main__":
    supervise(float(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(","))
