"""One process at a time: a file that a process locks as long as it lives."""

import errno
import fcntl
import os
import socket
import time

PATIENCE = 5.0  # seconds to wait for a process that may be ending


def take(path, patience=PATIENCE):
    """Lock the file at `path`, which is made -> the open file, and "".

    Where another process keeps it locked for `patience` seconds: None, and who that is, in words.
    The lock goes when the file is closed, and with the process however that ends. Processes that
    this one starts do not have it.
    """
    file = open(path, "a+", encoding="utf-8")
    deadline = time.monotonic() + patience
    while not _try(file):
        if time.monotonic() > deadline:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            return None, holder or "another process"
        time.sleep(0.1)

    # For the message of a process that comes later.
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file, ""


def _try(file):
    """Whether nobody else has the file locked. It is then this process that has."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some file systems of clusters lock nothing. There a run goes on without.
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
