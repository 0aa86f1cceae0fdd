"""What a script's end tells its user."""
import errno

import pytest

from nanorl.runtime import dist


@pytest.mark.parametrize("error, words", [
    (ValueError("--lr=x: why"), "--lr=x: why"), (MemoryError(), "--device_tokens"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "--device_rows"),
    (OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"), "last checkpoint")])
def test_trouble_that_is_not_a_defect_ends_with_one_line(error, words):
    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        dist.run(main)
    assert end.value.code.startswith("error: ") and words in end.value.code and "\n" not in end.value.code


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), FileNotFoundError(errno.ENOENT, "gone"), TypeError("no")])
def test_a_defect_keeps_its_traceback(error):
    def main():
        raise error
    with pytest.raises(type(error)):
        dist.run(main)
