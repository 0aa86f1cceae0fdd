"""One process at a time: a file that a process locks as long as it lives."""

import errno
import fcntl
import os
import socket


def take(path, wait=False):
    """Lock the file at `path`, which is made -> the open file, and who else has it.

    wait: until another process has let go of it. Otherwise, where another process has it, the first
    value is None and the second names that process. The lock goes when the file is closed, and with
    the process however that ends. Processes that this one starts do not have it.
    """
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            holder = file.read().strip()
            file.close()
            return None, holder or "another process"
        # Some file systems of clusters lock nothing. There the run goes on without.

    # For the message of a process that comes later.
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file, ""
