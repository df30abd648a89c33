"""Objects that do not fit into memory: on disk and back, whoever dies and whatever the disk does meanwhile."""

import contextlib
import gc
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import psutil
import pytest

MEGABYTE = 1_000_000
STORE = 64 * MEGABYTE
COUNT = 4 * STORE // MEGABYTE
pytestmark = pytest.mark.beyond_ray("Ray spills to files with names, and does not say what holds a full store")


@pytest.fixture
def spill_dir(tmp_path, monkeypatch):
    directory = tmp_path / "spill"
    directory.mkdir()
    monkeypatch.setenv("HPCRAY_SPILL_DIR", str(directory))
    return directory


@pytest.fixture
def job(own_init, spill_dir, monkeypatch):
    """A job with a small store whose waits for room are short."""
    monkeypatch.setenv("HPCRAY_STORE_TIMEOUT", "2")
    monkeypatch.setenv("HPCRAY_CHECK", "1")
    own_init.init(num_cpus=2, object_store_memory=STORE)
    yield own_init
    assert not spill_dir.exists() or not any(spill_dir.iterdir())


def value(number, size=MEGABYTE):
    return np.full(size, number % 251, dtype=np.uint8)


def is_value(array, number, size=MEGABYTE):
    return len(array) == size and array.min() == array.max() == number % 251


def fill(job, refs):
    """Put objects until there are four times as many as fit."""
    while len(refs) < COUNT:
        refs.append(job.put(value(len(refs))))


def raylet():
    (process,) = [p for p in psutil.Process().children(recursive=True) if "hpcray.launcher.local" in p.cmdline()]
    return process


def spill_files(directory, process=None):
    """The paths under /proc of the files without names that the raylet has in that directory."""
    found = []
    for path in Path(f"/proc/{(process or raylet()).pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = str(path.readlink())
            if target.startswith(str(directory)) and target.endswith("(deleted)"):
                found.append(path)
    return found


def bytes_on_disk(directory):
    size = 0
    for path in spill_files(directory):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_blocks * 512
    return size


def test_four_times_as_much_as_fits_comes_back_unchanged_by_get_and_as_arguments(job, spill_dir):
    refs = [job.put(value(number)) for number in range(COUNT)]
    assert bytes_on_disk(spill_dir) >= 3 * STORE * 0.9
    assert not any(spill_dir.iterdir())
    for path in spill_files(spill_dir):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.stat().st_nlink == 0
    for number, ref in enumerate(refs):
        assert is_value(job.get(ref), number)

    @job.remote
    def add_one(array):
        return array + 1

    for number, ref in enumerate([add_one.remote(ref) for ref in refs]):
        array = job.get(ref)
        assert array.min() == array.max() == number % 251 + 1


def test_disk_space_goes_back_with_the_objects_while_their_neighbours_stay(job, spill_dir, wait_until):
    refs = [job.put(value(number)) for number in range(COUNT)]
    full = bytes_on_disk(spill_dir)
    kept = refs[::8]
    del refs
    gc.collect()
    wait_until(lambda: bytes_on_disk(spill_dir) < full / 4)
    for number, ref in enumerate(kept):
        assert is_value(job.get(ref), 8 * number)
    del kept, ref
    wait_until(lambda: not spill_files(spill_dir))


def test_a_damaged_object_is_an_error_and_its_neighbours_are_not_touched(job, spill_dir):
    refs = [job.put(value(number)) for number in range(COUNT)]
    path = max(spill_files(spill_dir), key=lambda path: int(path.name))
    with path.open("r+b", buffering=0) as file:
        file.seek(12345)
        (before,) = file.read(1)
        file.seek(12345)
        file.write(bytes([before ^ 1]))
    errors = []
    for number, ref in enumerate(refs):
        try:
            assert is_value(job.get(ref), number)
        except job.exceptions.ObjectLostError as error:
            errors.append((ref, str(error)))
    ((lost, text),) = errors
    assert lost.hex() in text
    assert re.search(r"at offset 0 of spill file \d+ in " + re.escape(str(spill_dir)), text)
    assert "the checksum is" in text
    assert "--spill-dir" in text
    with pytest.raises(job.exceptions.ObjectLostError):
        job.get(lost)  # it stays an error


def test_a_disk_that_is_full_keeps_creators_waiting_and_says_so_when_they_give_up(job, spill_dir):
    soft, hard = resource.prlimit(raylet().pid, resource.RLIMIT_FSIZE)
    resource.prlimit(raylet().pid, resource.RLIMIT_FSIZE, (MEGABYTE // 2, hard))
    refs = []
    with pytest.raises(job.exceptions.ObjectStoreFullError) as caught:
        fill(job, refs)
    text = str(caught.value)
    assert f"could not be spilled (File too large, in {spill_dir})" in text
    assert re.search(
        r"an object of 1,000,\d+ bytes does not fit: the object store of rank 0 has 64,000,000 bytes", text
    )
    for number, ref in enumerate(refs):
        assert is_value(job.get(ref), number)
    resource.prlimit(raylet().pid, resource.RLIMIT_FSIZE, (soft, hard))
    fill(job, refs)
    for number, ref in enumerate(refs):
        assert is_value(job.get(ref), number)


def test_no_space_left_on_the_device_loses_nothing(own_init, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m,mode=0700", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        monkeypatch.setenv("HPCRAY_SPILL_DIR", str(disk))
        monkeypatch.setenv("HPCRAY_STORE_TIMEOUT", "2")
        own_init.init(num_cpus=1, object_store_memory=STORE)
        refs = []
        with pytest.raises(own_init.exceptions.ObjectStoreFullError, match="No space left on device"):
            fill(own_init, refs)
        assert len(refs) > 70, "what fits on the disk is used"
        with pytest.raises(own_init.exceptions.ObjectStoreFullError):
            own_init.get(refs[0])  # memory and disk are full: there is no room to exchange anything
        del refs[-3:]
        for number, ref in enumerate(refs):
            assert is_value(own_init.get(ref), number)
        own_init.shutdown()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_spill_directory_that_is_removed_loses_nothing(job, spill_dir):
    refs = [job.put(value(number)) for number in range(COUNT // 2)]
    assert spill_files(spill_dir)
    shutil.rmtree(spill_dir)
    for number, ref in enumerate(refs):
        assert is_value(job.get(ref), number)
    with pytest.raises(job.exceptions.ObjectStoreFullError, match="No such file or directory, in " + str(spill_dir)):
        fill(job, refs)
    spill_dir.mkdir()
    fill(job, refs)
    for number, ref in enumerate(refs):
        assert is_value(job.get(ref), number)


def test_a_get_of_more_than_fits_is_an_error_that_names_who_looks_and_loses_nothing(job):
    size = 10 * MEGABYTE
    refs = [job.put(value(number, size)) for number in range(10)]
    with pytest.raises(job.exceptions.ObjectStoreFullError) as caught:
        job.get(refs)
    text = str(caught.value)
    assert f"the driver with pid {os.getpid()} looks at " in text
    assert "get less at a time" in text
    del caught
    for _ in range(2):
        for number, ref in enumerate(refs):
            assert is_value(job.get(ref), number, size)


def test_what_is_larger_than_the_store_is_refused_at_once(job):
    with pytest.raises(job.exceptions.ObjectStoreFullError, match=r"70,000,\d+ bytes does not fit.*64,000,000|in all"):
        job.put(value(0, 70 * MEGABYTE))


def test_a_killed_reader_gives_its_memory_back(job, gate, wait_until):
    held = job.put(value(1, 40 * MEGABYTE))

    @job.remote(max_retries=0)
    def look(array, gate):
        gate.wait()
        return int(array[0])

    @job.remote(max_retries=0)
    def whoami():
        return os.getpid()

    looking = look.remote(held, gate)
    wait_until(gate.arrived)
    with pytest.raises(
        job.exceptions.ObjectStoreFullError, match=r"the worker with pid \d+ \(.*look\) looks at 40,0"
    ) as caught:
        job.put(value(2, 40 * MEGABYTE))
    reader = int(re.search(r"the worker with pid (\d+)", str(caught.value))[1])
    os.kill(reader, signal.SIGKILL)
    with pytest.raises(job.exceptions.WorkerCrashedError):
        job.get(looking)
    other = job.put(value(2, 40 * MEGABYTE))
    assert is_value(job.get(held), 1, 40 * MEGABYTE)
    assert is_value(job.get(other), 2, 40 * MEGABYTE)
    assert job.get(whoami.remote()) != reader


def test_a_writer_killed_in_the_middle_of_a_put_costs_no_byte(job):
    @job.remote(max_retries=0)
    def die_while_writing():
        from hpcray.store.arena import Arena

        def write_a_part(arena, offset, parts):
            arena.view(offset, MEGABYTE)[:] = bytes(MEGABYTE)
            os.kill(os.getpid(), signal.SIGKILL)

        Arena.write = write_a_part
        job.put(bytes(50 * MEGABYTE))

    small = job.put(value(7))
    for _ in range(3):
        with pytest.raises(job.exceptions.WorkerCrashedError):
            job.get(die_while_writing.remote())
    whole = job.put(value(9, STORE - MEGABYTE // 2))
    assert is_value(job.get(whole), 9, STORE - MEGABYTE // 2)
    del whole
    assert is_value(job.get(small), 7)


def test_nothing_is_left_when_every_process_of_the_job_is_killed(spill_dir, tmp_path, wait_until):
    shared = set(Path("/dev/shm").iterdir())
    temporary = set(Path(tempfile.gettempdir()).iterdir())
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import time, numpy as np, hpcray
            hpcray.init(num_cpus=2, object_store_memory={STORE})
            refs = [hpcray.put(np.full({MEGABYTE}, n % 251, dtype=np.uint8)) for n in range({COUNT})]
            print("full", flush=True)
            time.sleep(600)
            """
        )
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "full\n"
        job = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
        server = next(p for p in job if "hpcray.launcher.local" in p.cmdline())
        assert spill_files(spill_dir, server)
        for process in job:
            process.kill()
    wait_until(lambda: not any(process.is_running() for process in job), on_timeout=lambda: job)
    assert not any(spill_dir.iterdir())
    assert set(Path("/dev/shm").iterdir()) <= shared
    assert not [path for path in set(Path(tempfile.gettempdir()).iterdir()) - temporary if "hpcray" in path.name]
