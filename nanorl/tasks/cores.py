"""How many cores this process may use, which in a container is fewer than the machine has."""

import os

# Where Linux keeps the quotas of control groups: version 2, and version 1 under its two names.
GROUPS = ("sys/fs/cgroup", "sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct")


def cpus(root="/"):
    """The cores that the process may run on, or fewer where its CPU quota is less; at least 1.

    The affinity of the process tells the first (taskset, a job scheduler), its control groups the
    second (docker --cpus, Kubernetes). root: the folder that has proc and sys.
    """
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:
        # Only Linux has it.
        allowed = os.cpu_count() or 1
    return max(1, int(min([allowed, *quotas(root)])))


def quotas(root):
    """The CPU quotas that hold for the process, in cores. A group is bound by those above it."""
    found = []
    for path in group_paths(root):
        for groups in GROUPS:
            folder = os.path.join(root, groups, path)
            quota = read(folder, "cpu.max") or read(folder, "cpu.cfs_quota_us")
            if len(quota) == 1:
                # Version 1 has the period in a file of its own.
                quota += read(folder, "cpu.cfs_period_us")
            # No quota is written 'max' or -1.
            if len(quota) == 2 and quota[0].isdecimal():
                found.append(int(quota[0]) / int(quota[1]))
    return found


def group_paths(root):
    """The process's groups and all above them: 'a/b', 'a', ''."""
    paths = {""}
    for line in read(os.path.join(root, "proc/self"), "cgroup", split="\n"):
        # A line is 'number:controllers:/path'.
        path = line.split(":", 2)[-1].strip("/")
        while path:
            paths.add(path)
            path = os.path.dirname(path)
    return paths


def read(folder, name, split=None):
    """A file's words, or its lines; none where it cannot be read."""
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            return f.read().strip().split(split)
    except OSError:
        return []
