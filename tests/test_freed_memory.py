"""Memory that a step frees stays with the process for the next step."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, threading
from saejax.runner.environment import keep_freed_memory

keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def steps(count):
    for _ in range(count):
        block = libc.malloc({size})
        libc.memset(block, 1, {size})
        libc.free(block)

def faults(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=steps, args=(count,))  # XLA allocates on threads of its own
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(1)
print(faults(4))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has to be told")
def test_pages_of_large_blocks_are_faulted_in_once():
    size = 100 * 2**20
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(size=size)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 0.1 * 4 * size / 4096
