"""The sandbox: right programs pass, no wrong one does whatever it tries, and nothing that a program does outlives its run or reaches the caller."""

import glob
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest
from conftest import ROOT

from nanorl.tasks import sandbox
from nanorl.tasks.sandbox import LAYERS, LINUX, MARGIN, Result, pack, run, unpack

INCREMENT = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 3\n    assert candidate([3])[0] == 4\n"
RIGHT = "def f(x):\n    return [x[0] + 1] if isinstance(x, list) else x + 1\n"
WITHOUT = [
    LAYERS,
    ("uid", "calls"),
    ("uid", "namespaces"),
    ("uid",),
    ("calls",),
    ("namespaces",),
    (),
]  # () is root in a container that may do nothing
MODES = pytest.mark.parametrize("layers", WITHOUT, ids=lambda layers: "+".join(layers) or "none")
FENCED = pytest.mark.parametrize(
    "layers", [x for x in WITHOUT if x and x != ("namespaces",)], ids="+".join
)  # the layers that a fork bomb meets


def processes(marker):
    """The processes whose command line has the marker: a run's `seconds` is on its processes', those forked included."""
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            with open(path, "rb") as f:
                found += [path] * (marker.encode() in f.read())
        except OSError:
            pass
    return found


@pytest.fixture(autouse=True, scope="module")
def own_folder_for_temporary_files():
    """So that what another process leaves there is not taken for ours."""
    with tempfile.TemporaryDirectory(prefix="sandbox-tests-") as folder:
        os.chmod(folder, 0o711)  # programs run as another user
        patch = pytest.MonkeyPatch()
        patch.setattr(tempfile, "tempdir", folder)
        patch.setenv("TMPDIR", folder)
        yield
        patch.undo()


def homes():
    return set(glob.glob(os.path.join(tempfile.gettempdir(), "nanorl-*")))


def run_clean(program, test=INCREMENT, seconds=2.0, layers=LAYERS, **settings):
    """run(), which must be back in time and leave nothing."""
    seconds += float.fromhex("0x1p-20") * (1 + hash(program) % 1000)  # no other run's
    before, begun = homes(), time.monotonic()
    result = run(program, "f", test, seconds=seconds, layers=layers, **settings)
    assert time.monotonic() - begun < seconds + MARGIN  # the machine may be slow
    assert not processes(repr(seconds)) and homes() <= before
    return result


@MODES
def test_right_programs_pass(layers):
    assert run_clean(RIGHT, layers=layers) == Result(True, "passed")
    assert run_clean(
        "import collections, dataclasses, decimal, fractions, functools, hashlib, heapq, itertools, json.tool, math, re, string, typing, xml.dom\n"
        "@dataclasses.dataclass\nclass A:\n    x: int\n" + RIGHT,
        layers=layers,
    ).passed  # the standard library is at hand


def test_helpers_and_the_functions_own_name():
    test = "def check(candidate):\n    assert candidate(double(2), y=1) == 5 and f(1, y=1) == 2\n"
    assert run_clean(
        "def f(x, y):\n    return x + y\n",
        test,
        helpers="def double(x):\n    return 2 * x\ndef f(x, y):\n    pass\n",
    ).passed
    assert run_clean("def f(x, y):\n    return x + y\n", test) == Result(
        False, "wrong: NameError: name 'double' is not defined"
    )


@pytest.mark.parametrize(
    "program, why",
    [
        ("def f(x):\n    return x\n", "wrong: AssertionError"),
        ("def f(x) return x\n", "syntax error"),
        ("def f(x):\n  return x\n return 1\n", "syntax error"),
        ("def g(x):\n    return x + 1\n", "the program: NameError: no function f"),
        ("f = 3\n", "the program: NameError: no function f"),
        ("1 / 0\n", "the program: ZeroDivisionError: division by zero"),
        ("def f(x):\n    return 1 / 0\n", "wrong: ZeroDivisionError: division by zero"),
        ("def f(x):\n    return f(x)\n", "wrong: RecursionError: maximum recursion depth exceeded"),
        ("import ctypes\ndef f(x):\n    ctypes.string_at(0)\n", "died (signal 11)"),
        ("def f(x):\n    return 'x' * 2_000_000\n", "answer too long"),
        (
            "def f(x):\n    return (i for i in [2])\n",
            "wrong: TypeError: a generator is not plain data",
        ),
        ("def f(x):\n    return object()\n", "wrong: TypeError: a object is not plain data"),
        (
            "def f(x):\n    raise ValueError('é' * 200)\n",
            "wrong: ValueError: " + "é" * 140 + "\ufffd",
        ),
        ("def f(x):\n    while True: pass\n", "timeout"),
    ],
)
def test_why(program, why):
    assert run_clean(program) == Result(False, why)


# ---- cheats: each is a wrong program ---------------------------------------------------------------------------

WRITE_ALL = "for fd in range(64):\n        try: os.write(fd, text)\n        except OSError: pass\n"
CHEATS = {
    "exit": "import sys\nsys.exit(0)\n",
    "exit in the function": "import sys\ndef f(x):\n    sys.exit(0)\n",
    "_exit": "import os\nos._exit(0)\n",
    "_exit in the function": "import os\ndef f(x):\n    os._exit(0)\n",
    "SystemExit": "def f(x):\n    raise SystemExit\n",
    "KeyboardInterrupt": "def f(x):\n    raise KeyboardInterrupt\n",
    "says passed": "import os\ndef f(x):\n    print('passed')\n    text = b'passed\\n'\n    "
    + WRITE_ALL,
    "says passed everywhere, then exits": "import os\ndef f(x):\n    text = b'[\"passed\"]\\n'\n    "
    + WRITE_ALL
    + "    os._exit(0)\n",
    "__eq__": "class A:\n    def __eq__(self, other): return True\n    def __getitem__(self, i): return self\ndef f(x):\n    return A()\n",
    "int with __eq__": "class A(int):\n    def __eq__(self, other): return True\n    def __getitem__(self, i): return self\ndef f(x):\n    return A(7)\n",
    "list with __eq__": "class A(list):\n    def __eq__(self, other): return True\n    def __getitem__(self, i): return self\ndef f(x):\n    return A()\n",
    "number by registration": "import numbers\nclass A:\n    def __eq__(self, other): return True\n    def __int__(self): return 7\nnumbers.Integral.register(A)\ndef f(x):\n    return A()\n",
    "builtins": "import builtins\nfor name in ('isinstance', 'all', 'any', 'len', 'compile', 'type', 'print'):\n    setattr(builtins, name, lambda *a, **k: True)\ndef f(x):\n    return 7\n",
    "AssertionError": "import builtins\nbuiltins.AssertionError = None\nbuiltins.__debug__ = False\ndef f(x):\n    return 7\n",
    "raises AssertionError": "def f(x):\n    raise AssertionError('passed')\n",
    "patches check": "import sys\nfor m in list(sys.modules.values()):\n    for name in ('check', 'tester', 'run', 'unpack', 'ask', 'say'):\n        setattr(m, name, lambda *a, **k: True)\ndef f(x):\n    return 7\n",
    "replaces itself": "import sys\nsys.modules['program'] = sys.modules['__main__'] = None\ndef f(x):\n    return 7\n",
    "excepthook, atexit": "import sys, atexit\nsys.excepthook = print\natexit.register(print, 'passed')\ndef f(x):\n    return 7\n",
    "frames": "import os, sys\ndef f(x):\n    frame, text = sys._getframe(), b''\n    while frame:\n        text += repr({**frame.f_locals, **frame.f_globals}).encode()\n        frame = frame.f_back\n"
    "    import re\n    for text in re.findall(rb'[0-9a-f]{32}', text):\n        "
    + WRITE_ALL.replace("\n    ", "\n        ")
    + "    return 7\n",
    "gc": "import gc, os, re\ndef f(x):\n    text = b' '.join(re.findall(rb'[0-9a-f]{32}', repr([o for o in gc.get_objects() if type(o) in (list, dict, tuple)]).encode()))\n    "
    + WRITE_ALL,
    "raises what comes": "def f(x):\n    raise [StopIteration, GeneratorExit, SystemExit][x % 3]\n",
    "signal to the supervisor": "import os\ndef f(x):\n    os.kill(os.getppid(), 15)\n    return 7\n",
    "signals to the group": "import os, signal\nsignal.signal(15, signal.SIG_IGN)\ndef f(x):\n    os.killpg(0, 15)\n    return 7\n",
    "another program": "import os\ndef f(x):\n    os.execv('/bin/echo', ['echo', 'passed'])\n",
    "no answer but silence": "import os\nos.closerange(0, 64)\ndef f(x):\n    return 7\n",
    "garbage": "import os\ndef f(x):\n    text = b'passed\\n'\n    " + WRITE_ALL,
    "an unhashable item": 'import os\ndef f(x):\n    text = b\'["value", {"set": [[1]]}]\\n\'\n    '
    + WRITE_ALL,
    "an unknown type": 'import os\ndef f(x):\n    text = b\'["value", {"object": []}]\\n\'\n    '
    + WRITE_ALL,
    "an answer without a value": "import os\ndef f(x):\n    text = b'[\"value\"]\\n'\n    "
    + WRITE_ALL,
    "an exit for the tester": 'import os\ndef f(x):\n    text = b\'["error", "SystemExit", "0"]\\n\'\n    '
    + WRITE_ALL,
    "deeply nested": "import os\ndef f(x):\n    text = b'[' * 500_000 + b'\\n'\n    " + WRITE_ALL,
    "a long number": "import os\ndef f(x):\n    text = b'[\"value\", ' + b'9' * 500_000 + b']\\n'\n    "
    + WRITE_ALL,
    "NaN": "def f(x):\n    return float('nan')\n",
    "an argument that it changes": "def f(x):\n    if isinstance(x, list):\n        x[0] = 4\n    return x\n",
}


@pytest.mark.parametrize(
    "layers", [LAYERS, pytest.param((), marks=pytest.mark.slow)], ids=["all", "none"]
)
@pytest.mark.parametrize("name", CHEATS)
def test_cheats_fail(name, layers):
    assert not run_clean(CHEATS[name], layers=layers).passed


# Right answers only if a process of this run, or the caller, can be looked into or its pipes be opened: then the secret is there to find.
PEEK = """
import os, sys
def looks():
    for pid in {pids}:
        for name in ('mem', 'environ', 'maps'):
            try:
                open(f'/proc/{{pid}}/{{name}}', 'rb').read(10)
                return True
            except OSError as error:
                if error.errno == 5:  # opened, and nothing at address 0
                    return True
        for fd in range(8):
            try:
                os.close(os.open(f'/proc/{{pid}}/fd/{{fd}}', os.O_RDONLY | os.O_NONBLOCK))
                return True
            except OSError:
                pass
peeked = looks()
def f(x):
    return ([x[0] + 1] if isinstance(x, list) else x + 1) if peeked else 7
"""


@MODES
def test_the_supervisor_and_the_tester_cannot_be_looked_into(layers):
    others = "[int(p) for p in os.listdir('/proc') if p.isdigit() and open(f'/proc/{p}/cmdline').read() == open('/proc/self/cmdline').read() and p != os.readlink('/proc/self')]"
    assert run_clean(
        PEEK.format(pids="[os.readlink('/proc/self')]"), layers=layers
    ).passed  # the test can see what it looks for
    assert (
        run_clean("import os\n" + PEEK.format(pids=others), layers=layers).why
        == "wrong: AssertionError"
    )


@pytest.mark.skipif(os.getuid() != 0, reason="only root has another user's rights to give away")
def test_root_gives_its_rights_away(tmp_path):
    """The caller cannot be looked into, its files not be removed, and its user's files not be read."""
    assert (
        run_clean("import os\n" + PEEK.format(pids=[os.getpid()]), layers=("uid",)).why
        == "wrong: AssertionError"
    )
    file = tmp_path / "mine"
    file.write_text("x")
    file.chmod(0o600)
    for path in (tmp_path, *tmp_path.parents):
        path.chmod(
            path.stat().st_mode | 0o011
        ) if path.owner() == "root" and path != tmp_path.parents[-1] else None
    result = run_clean(f"import os\nos.remove({str(file)!r})\n", layers=("uid",))
    assert "PermissionError" in result.why and file.exists()
    assert "PermissionError" in run_clean(f"open({str(file)!r})\n", layers=("uid",)).why


def test_the_tester_ends_well_only_by_reaching_the_end():
    for last in (
        "raise SystemExit(0)",
        "raise KeyboardInterrupt",
        "import os; os._exit(0)",
        "print('passed'); os.nothing",
    ):
        assert not run_clean(RIGHT, INCREMENT + f"    {last}\n").passed
    if LINUX:  # the test's own source can see this: other processes of the same user cannot read the one that it runs in
        assert run_clean(
            RIGHT, INCREMENT + "    import ctypes\n    assert ctypes.CDLL(None).prctl(3) == 0\n"
        ).passed


def test_a_death_is_not_the_exception_that_a_test_expects():
    test = "def check(candidate):\n    try:\n        candidate(1)\n    except {}:\n        pass\n    else:\n        assert False\n"
    for expected in ("ValueError", "Exception", "BaseException"):
        assert run_clean("def f(x):\n    raise ValueError('no')\n", test.format(expected)).passed
        for wrong in (
            "import os\n    os._exit(0)",
            "import os\n    os.closerange(3, 9)",
            "return 'x' * 2_000_000",
            'import os\n    for fd in range(3, 9):\n        try: os.write(fd, b\'["value", {"object": []}]\\n\')\n        except OSError: pass',
        ):
            assert not run_clean(f"def f(x):\n    {wrong}\n", test.format(expected)).passed


@pytest.mark.parametrize(
    "raised, seen",
    [
        ("ValueError('a b')", "ValueError: a b"),
        ("KeyError('k')", "KeyError: \"'k'\""),
        ("TypeError('t')", "TypeError: t"),
        (
            "UnicodeDecodeError('utf-8', b'x', 0, 1, 'y')",
            "Exception: UnicodeDecodeError: 'utf-8' codec",
        ),
        ("type('Own', (ValueError,), {})('o')", "Exception: Own: o"),
        ("SystemExit(0)", "Exception: SystemExit: 0"),
    ],
)
def test_exceptions_arrive_by_name(raised, seen):
    assert run_clean(f"def f(x):\n    raise {raised}\n").why.startswith("wrong: " + seen)


# ---- values ----------------------------------------------------------------------------------------------------

VALUES = [
    None,
    True,
    0,
    -3,
    10**300,
    0.1,
    -0.0,
    math.inf,
    -math.inf,
    1e-320,
    1 + 2j,
    complex(math.inf, -0.0),
    "",
    'é\n"\ud800',
    b"\x00\xff",
    [],
    [[1], (2,)],
    (),
    (1, [2]),
    {},
    {1: "a", (1, 2): [3], None: {}},
    set(),
    {1, (2, 3)},
    frozenset({1}),
    {frozenset({2}): {1.5}},
    [True, 1, 1.0],
    {"set": [1], "dict": 1},
]


def same(a, b):
    return type(a) is type(b) and repr(a) == repr(b)


def test_plain_values_come_back_with_their_types():
    for value in VALUES:
        assert same(unpack(pack(value)), value)
    check = f"def check(candidate):\n    from math import inf\n    for v in {VALUES!r}:\n        got = candidate(v)\n        assert type(got) is type(v) and repr(got) == repr(v)\n"
    assert run_clean(
        "def f(x):\n    return x\n", check.replace("(inf-0j)", "complex(inf, -0.0)")
    ).passed
    assert run_clean(
        "def f(x):\n    return x\n",
        "def check(candidate):\n    v = candidate(float('nan'))\n    assert v != v and type(v) is float\n",
    ).passed


def test_subclasses_and_numbers_become_plain():
    import collections
    import enum

    import numpy as np

    point = collections.namedtuple("point", "x y")
    cases = [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.bool_(True), None),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.OrderedDict(a=1), {"a": 1}),
        (point(1, 2), (1, 2)),
        (enum.IntEnum("E", "A").A, 1),
        (np.complex128(1j), 1j),
        (np.str_("s"), "s"),
    ]
    for value, plain in cases:
        if plain is not None:
            assert same(unpack(pack([value])), [plain])
    for value in (object(), iter([]), range(3), {1: len}, [np.zeros(2)]):
        with pytest.raises(TypeError, match="not plain data"):
            pack(value)


# ---- what a program may not do ---------------------------------------------------------------------------------


def answers(program, test_of_answer, layers=LAYERS, **settings):
    """Asserts on what the program finds out: `answer` in the test."""
    result = run_clean(
        program,
        f"def check(candidate):\n    answer = candidate()\n    assert {test_of_answer}, repr(answer)[:250]\n",
        layers=layers,
        **settings,
    )
    assert result.passed, result.why


@MODES
def test_the_surroundings_are_empty(layers, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    answers(
        "import os\ndef f():\n    return sorted(os.environ) + os.listdir('.')",
        "set(answer) <= {'HOME', 'LANG', 'PATH', 'LD_LIBRARY_PATH', 'LC_CTYPE'}",
        layers,
    )
    answers(
        "import os\ndef f():\n    return [os.fstat(fd).st_rdev for fd in range(3)], os.fstat(0).st_rdev == os.stat('/dev/null').st_rdev",
        "answer == ([answer[0][0]] * 3, True)",
        layers,
    )
    pipes = "import os\ndef f():\n    found = 0\n    for fd in range(64):\n        try: found += 'pipe:' in os.readlink(f'/proc/self/fd/{fd}')\n        except OSError: pass\n    return found"
    answers(pipes, "answer == 2", layers)  # the tester's calls and the answers, and no other


@MODES
def test_limits_and_rights(layers):
    answers(
        "import resource as r\ndef f():\n    return [r.getrlimit(x)[1] for x in (r.RLIMIT_CPU, r.RLIMIT_AS, r.RLIMIT_FSIZE, r.RLIMIT_NPROC, r.RLIMIT_NOFILE, r.RLIMIT_CORE)]"
        if "calls" not in layers
        # there getrlimit is refused too
        else "def f():\n    text = open('/proc/self/limits').read()\n    return [int(next(l for l in text.splitlines() if l.startswith('Max ' + n))[26:].split()[1])"
        " for n in ('cpu time', 'address space', 'file size', 'processes', 'open files', 'core file size')]",
        f"answer == [4, {100 << 20}, {1 << 20}, 1, 32, 0]",
        layers,
        memory=100 << 20,
    )
    status = "def f():\n    return dict(line.split(':', 1) for line in open('/proc/self/status').read().split('\\n') if line)"
    answers(
        status,
        "answer['CapEff'].strip('\\t0') == '' and answer['CapPrm'].strip('\\t0') == '' and answer['NoNewPrivs'] == '\\t1'",
        layers,
    )
    if os.uname().machine in sandbox.CALLS:
        answers(status, f"answer['Seccomp'] == '\\t{2 if 'calls' in layers else 0}'", layers)
    if os.getuid() == 0:
        answers(
            status,
            "min(map(int, (answer['Uid'] + answer['Gid'] + answer['Groups']).split())) >= 61184"
            if "uid" in layers
            else "answer['Uid'].split()[0] == '0'",
            layers,
        )


REFUSED = {
    "fork": "os.fork()",
    "a command": "os.system('true') and 1 / 0",
    "exec": "os.execv('/bin/true', ['true'])",
    "a thread": "_thread.start_new_thread(print, ())",
    "a socket": "socket.socket()",
    "a file": "open('x', 'w')",
    "a file to append to": "open('/dev/null', 'a')",
    "removal": "os.remove({mine!r})",
    "emptying": "os.open({mine!r}, os.O_TRUNC)",
    "a rename": "os.rename({mine!r}, {mine!r} + '2')",
    "a directory": "os.mkdir('x')",
    "mode": "os.chmod({mine!r}, 0)",
    "kill": "os.kill({caller}, 0)",
    "SIGIO": "fcntl.fcntl(0, fcntl.F_SETOWN, {caller})",
    "limits": "resource.prlimit({caller}, resource.RLIMIT_CORE)",
    "priority": "os.setpriority(os.PRIO_PROCESS, 0, 5)",
}


@pytest.mark.skipif(
    not LINUX or os.uname().machine not in sandbox.CALLS,
    reason="the list of calls is for Linux on x86-64 and arm64",
)
@pytest.mark.parametrize("name", REFUSED)
def test_calls_are_refused(name, tmp_path):
    """By the list alone, without root's other user id, so for everybody."""
    mine = tmp_path / "mine"
    mine.write_text("x")
    action = REFUSED[name].format(mine=str(mine), caller=os.getpid())
    answers(
        f"import _thread, fcntl, os, resource, socket\ndef f():\n    try:\n        {action}\n    except (OSError, RuntimeError, ZeroDivisionError) as error:\n        return 'refused'",
        "answer == 'refused'",
        ("calls",),
    )
    assert mine.read_text() == "x" and mine.stat().st_mode & 0o600


@MODES
def test_network(layers):
    """Taken away by the list of calls, or by a namespace; where there is neither it is there, as the module says."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import os, socket\ndef f():\n    try:\n        socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=1)\n        connected = True\n    except OSError:\n        connected = False\n    return connected, os.readlink('/proc/self/ns/net')"
        own = (
            "namespaces" in layers
            and subprocess.run(
                ["unshare", "--net"] + ["--user"] * (os.getuid() != 0) + ["true"],
                stderr=subprocess.DEVNULL,
            ).returncode
            == 0
        )
        refused = own or "calls" in layers and os.uname().machine in sandbox.CALLS
        answers(
            program,
            f"answer[0] is {not refused} and (answer[1] != {os.readlink('/proc/self/ns/net')!r}) is {own}",
            layers,
        )


# ---- survival --------------------------------------------------------------------------------------------------

IGNORE = "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
SURVIVE = {
    "a loop": "while True: pass\n",
    "a loop that no signal ends": IGNORE + "while True: pass\n",
    "an alarm that comes again": "import signal\nsignal.signal(signal.SIGALRM, lambda *a: None)\nwhile True:\n    try:\n        while True: pass\n    except BaseException: pass\n",
    "sleep": "import time\ntime.sleep(100)\n",
    "a loop in C": "import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')\n",
    "a loop in the answer": "class A(int):\n    def __int__(self):\n        while True: pass\n    __index__ = __trunc__ = __int__\ndef f(x):\n    return A()\n",
    "10 GB": "x = bytearray(10 << 30)\n",
    "as much as there is": "x = []\nwhile True: x.append(bytearray(1 << 20))\n",
    "memory, errors ignored": "x = []\nwhile True:\n    try: x.append(bytearray(1 << 20))\n    except MemoryError: pass\n",
    "output": "while True: print('x' * 100_000)\n",
    "errors": "import sys\nwhile True: sys.stderr.write('x' * 100_000)\n",
    "a flood on every descriptor": "import os\nwhile True:\n    for fd in range(64):\n        try: os.write(fd, b'x' * 100_000)\n        except OSError: pass\n",
    "a flood of answers": "import os\nwhile True:\n    for fd in range(3, 64):\n        try: os.write(fd, b'[\"value\", 7]\\n' * 1000)\n        except OSError: pass\n",
    "no reading": "import time\ndef f(x):\n    time.sleep(100)\n",
    "recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x):\n    return f(x)\n",
    "recursion in data": "def f(x):\n    x = []\n    x.append(x)\n    return x\n",
    "a large answer": "def f(x):\n    return list(range(10 ** 7))\n",
    "closed descriptors": "import os, time\nos.closerange(0, 1000)\ntime.sleep(100)\n",
    "a large file": "f = open('x', 'wb')\nwhile True: f.write(b'x' * 1_000_000)\n",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(100,)).start()\n",
    "an endless number": "def f(x):\n    return 10 ** 10 ** 8\n",
}


@pytest.mark.parametrize(
    "layers", [LAYERS, pytest.param(("uid",), marks=pytest.mark.slow)], ids="+".join
)
@pytest.mark.parametrize("name", SURVIVE)
def test_it_survives(name, layers):
    assert not run_clean(SURVIVE[name], seconds=0.25, layers=layers).passed


FORKS = """
import os, time
count = 0
for _ in range(30):
    try:
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for fd in range(64):
                    try: os.close(fd)
                    except OSError: pass
            time.sleep(20)
            os._exit(0)  # should a sandbox that does not work leave it: it must not go on with this loop
        count += 1
    except OSError: pass
def f(x=0):
    return {}
"""


@FENCED
def test_a_fork_bomb_gets_nowhere(layers):
    answers(FORKS.format("count"), "answer == 0", layers)
    assert not run_clean(
        "import os, time\nend = time.time() + 9\nfor _ in range(6):\n    try: os.fork()\n    except OSError: pass\nwhile time.time() < end: pass\n",
        seconds=0.25,
        layers=layers,
    ).passed


@pytest.mark.parametrize("layers", [(), ("namespaces",)], ids=["none", "namespaces"])
@pytest.mark.parametrize(
    "program, passed",
    [
        (FORKS.format("[x[0] + 1] if isinstance(x, list) else x + 1"), True),
        (FORKS.format("7"), False),
        (FORKS.format("7") + "while True: pass\n", False),
    ],
    ids=["passes", "fails", "hangs"],
)
def test_children_in_the_background_end_with_the_run(layers, program, passed):
    """Root keeps its user id here, and then no limit holds for it: thirty sessions of their own, and each one's orphan."""
    if os.getuid() == 0:
        answers(FORKS.format("count"), "answer == 30", layers, seconds=3.0)
    assert run_clean(program, layers=layers, seconds=1.5).passed == passed


def test_memory_is_bounded():
    """In a process that has had no other children: what the largest of a run's processes had."""
    code = (
        f"import resource, sys; sys.path.insert(0, {ROOT!r}); from nanorl.tasks.sandbox import run\n"
        f"why = run({SURVIVE['memory, errors ignored']!r}, 'f', '', seconds=1.0, memory=150 << 20).why\nprint(why, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)"
    )
    why, megabytes = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    ).stdout.split()
    assert why == "timeout" and 100 < int(megabytes) <= 150
    assert run(
        "def f(x):\n    return bytearray(100 << 20) and x + 1\n",
        "f",
        INCREMENT.replace("[3])[0]", "3)"),
        memory=150 << 20,
    ).passed
    assert (
        "MemoryError"
        in run(
            "def f(x):\n    return bytearray(200 << 20) and x + 1\n",
            "f",
            INCREMENT,
            memory=150 << 20,
        ).why
    )


def test_a_test_that_hangs_on_the_answer_is_ended_too():
    assert run_clean(
        "def f():\n    return 10 ** 18\n",
        "def check(candidate):\n    for _ in range(candidate()): pass\n",
        seconds=0.4,
    ) == Result(False, "timeout")
    assert (
        "MemoryError"
        in run_clean(
            "def f():\n    return 10 ** 11\n", "def check(candidate):\n    'x' * candidate()\n"
        ).why
    )


@pytest.mark.parametrize("layers", [LAYERS, ("uid",), ()], ids=["all", "uid", "none"])
def test_nothing_outlives_a_killed_trainer(layers):
    before, seconds = homes(), 50.0123 + len(layers)
    program = (FORKS.format("7") if layers == () else "") + IGNORE + "while True: pass\n"
    caller = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {ROOT!r}); from nanorl.tasks.sandbox import run\n"
            f"run({program!r}, 'f', '', seconds={seconds}, layers={layers!r})",
        ]
    )
    wait_until(lambda: len(processes(f"{seconds}\0")) >= 3)
    time.sleep(0.3)
    caller.kill()
    caller.wait()
    wait_until(lambda: not processes(f"{seconds}\0") and homes() <= before)


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_runs_side_by_side_in_threads():
    """The caller may have threads: nothing is forked from it, and one run's descriptors do not reach another's."""
    results = {}

    def one(i):
        results[i] = run(
            f"def f():\n    return {i}\n",
            "f",
            f"def check(candidate):\n    assert candidate() == {i // 2 * 2}\n",
        ).passed

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert results == {i: i % 2 == 0 for i in range(8)}


def test_the_callers_own_deadline_is_the_last_resort(monkeypatch, tmp_path):
    """Should the supervisor hang."""
    path = tmp_path / "sandbox.py"
    path.write_text(
        re.sub(r"\n    supervise\(.*", "\n    time.sleep(60)", open(sandbox.__file__).read())
    )
    monkeypatch.setattr(sandbox, "__file__", str(path))
    monkeypatch.setattr(sandbox, "MARGIN", 0.2)
    assert run_clean(RIGHT, seconds=0.2) == Result(False, "timeout")


def test_it_loads_little():
    """Without torch or numpy: the module is the script of every process it starts."""
    code = f"import sys; sys.argv = ['x']; import importlib.util as u; s = u.spec_from_file_location('sandbox', {sandbox.__file__!r}); m = u.module_from_spec(s); s.loader.exec_module(m); print('numpy' in sys.modules, 'subprocess' in sys.modules)"
    assert subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True
    ).stdout.split() == ["False", "False"]


def test_a_test_that_loops_over_calls_is_not_ended_by_the_program():
    """StopIteration would end map() as if all had been seen."""
    for check in (
        "def check(f):\n    assert all(map(lambda x: f(x) == x + 1, [1, 2, 3]))",
        "def check(f):\n    for y in map(f, [1, 2]):\n        assert y == 5",
    ):
        assert not run("def f(x):\n    raise StopIteration", "f", check).passed
        assert not run("def f(x):\n    raise StopAsyncIteration", "f", check).passed
