"""CPUs and memory that a process may use: trees of cgroups below a root, both versions, and the affinity."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from qwq_lite.plan import speed
from qwq_lite.system import process_limits
from qwq_lite.system.units import MIB

MACHINE = 64 << 30  # free on it, and in all
V1_UNLIMITED = 9223372036854771712
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=MACHINE, available=MACHINE))


class Tree:
    """A root with /proc/self, one hierarchy of cgroups and the limits in it, written as either version writes them."""

    def __init__(self, root: Path, version: int, group: str, top: str = "/", point: str = "/sys/fs/cgroup") -> None:
        self.root, self.version, self.point = root, version, root / point.lstrip("/")
        line = f"0::{group}\n" if version == 2 else f"9:name=systemd:/init\n4:memory:{group}\n3:cpu,cpuacct:{group}\n"
        escaped = point.replace(" ", "\\040")
        kind, options = ("cgroup2", "rw,nsdelegate") if version == 2 else ("cgroup", "rw,memory,cpu,cpuacct")
        mounts = (
            "23 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
            f"31 23 0:28 {top} {escaped} rw,relatime shared:9 - {kind} cgroup {options}\n"
        )
        self._write(root / "proc/self", {"cgroup": line, "mountinfo": mounts})

    def memory(
        self, folder: str, limit: int | None, usage: int, *, files: int = 0, shmem: int = 0, high: int | None = None
    ) -> Tree:
        """A group's memory, in bytes: of its usage, `files` lie in pages of files and `shmem` in shared memory."""
        active, inactive = files // 3, files - files // 3
        if self.version == 2:
            stat = f"anon {usage - files}\nfile {files + shmem}\nshmem {shmem}\n"
            stat += f"inactive_file {inactive}\nactive_file {active}\n"
            limits = {"memory.max": "max" if limit is None else limit, "memory.high": "max" if high is None else high}
            own = {**limits, "memory.current": usage, "memory.stat": stat}
        else:
            # The rows without total_ are those of the group's own processes alone.
            stat = f"cache {files + shmem}\nshmem {shmem}\ninactive_file 0\nactive_file 0\n"
            stat += f"total_cache {files + shmem}\ntotal_inactive_file {inactive}\ntotal_active_file {active}\n"
            own = {"memory.limit_in_bytes": V1_UNLIMITED if limit is None else limit}
            own |= {"memory.usage_in_bytes": usage, "memory.stat": stat}
        self._write(self.point / folder, own)
        return self

    def cpu(self, folder: str, quota: int | None, period: int = 100_000) -> Tree:
        if self.version == 2:
            self._write(self.point / folder, {"cpu.max": f"{'max' if quota is None else quota} {period}"})
        else:
            own = {"cpu.cfs_quota_us": -1 if quota is None else quota, "cpu.cfs_period_us": period}
            self._write(self.point / folder, own)
        return self

    @property
    def available(self) -> int:
        return process_limits.available_memory_bytes(self.root)

    @staticmethod
    def _write(folder: Path, files: Mapping[str, object]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (folder / name).write_text(f"{value}\n")


Grow = Callable[..., Tree]


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def grow(request: pytest.FixtureRequest, tmp_path: Path) -> Grow:
    version: int = request.param
    return lambda group, *rest, **fields: Tree(tmp_path, version, group, *rest, **fields)


# Memory


def test_the_own_group_counts(grow: Grow) -> None:
    """What Slurm and systemd do: the limit is on a group far below the top, which has none."""
    tree = grow("/system.slice/job_7/step_0").memory("", None, 9000 * MIB).memory("system.slice", None, 8000 * MIB)
    tree.memory("system.slice/job_7", None, 300 * MIB).memory("system.slice/job_7/step_0", 500 * MIB, 300 * MIB)
    assert tree.available == 200 * MIB
    assert process_limits.total_memory_bytes(tree.root) == 500 * MIB


@pytest.mark.parametrize("tight", ["job_7", "job_7/step_0", "job_7/step_0/task_1"])
def test_the_tightest_of_all_ancestors_counts(grow: Grow, tight: str) -> None:
    tree = grow("/job_7/step_0/task_1").memory("", None, 9000 * MIB)
    for group in ("job_7", "job_7/step_0", "job_7/step_0/task_1"):
        tree.memory(group, (400 if group == tight else 4000) * MIB, 300 * MIB)
    assert tree.available == 100 * MIB


def test_an_ancestor_that_others_fill_is_full_for_all(grow: Grow) -> None:
    tree = grow("/job_7/step_0").memory("job_7", 1000 * MIB, 950 * MIB).memory("job_7/step_0", 900 * MIB, 10 * MIB)
    assert tree.available == 50 * MIB


@pytest.mark.parametrize("group", ["/", "/../..", "/../other"])
def test_the_top_of_a_namespace_is_the_mounts_top(grow: Grow, group: str) -> None:
    assert grow(group).memory("", 800 * MIB, 500 * MIB).available == 300 * MIB


@pytest.mark.parametrize(
    ("group", "top"),
    [("/docker/abc", "/docker/abc"), ("/../x", "/.."), ("/docker/abc/in", "/docker/abc"), ("/", "/..")],
)
def test_a_mount_may_show_a_part_of_the_tree(grow: Grow, group: str, top: str) -> None:
    tree = grow(group, top).memory("", 800 * MIB, 500 * MIB).memory("x", 700 * MIB, 500 * MIB)
    tree.memory("in", 600 * MIB, 500 * MIB).memory("docker/abc", 10 * MIB, 0)
    expected = {"/docker/abc": 300, "/../x": 200, "/docker/abc/in": 100, "/": 300}
    assert tree.available == expected[group] * MIB


def test_a_full_cache_is_free(grow: Grow) -> None:
    """The model's own pages, read once: all but the rest may be taken again."""
    assert grow("/job").memory("job", 500 * MIB, 500 * MIB, files=450 * MIB).available == 450 * MIB


def test_shared_memory_is_not_free(grow: Grow) -> None:
    """The kernel counts it as cache, and cannot give it back."""
    assert grow("/job").memory("job", 500 * MIB, 500 * MIB, files=100 * MIB, shmem=300 * MIB).available == 100 * MIB


@pytest.mark.parametrize("usage", [500, 501])
def test_a_full_group_has_nothing(grow: Grow, usage: int) -> None:
    assert grow("/job").memory("job", 500 * MIB, usage * MIB).available == 0


def test_pages_that_are_counted_late_give_no_more_than_the_limit(grow: Grow) -> None:
    assert grow("/job").memory("job", 500 * MIB, 100 * MIB, files=300 * MIB).available == 500 * MIB


def test_without_a_limit_the_machine_counts(grow: Grow) -> None:
    tree = grow("/job").memory("", None, 100 * MIB).memory("job", None, 100 * MIB)
    assert (tree.available, process_limits.total_memory_bytes(tree.root)) == (MACHINE, MACHINE)


@pytest.mark.parametrize("lost", ["usage", "limit", "stat"])
def test_what_cannot_be_read_limits_nothing(grow: Grow, lost: str) -> None:
    tree = grow("/job/step").memory("job", 700 * MIB, 100 * MIB).memory("job/step", 500 * MIB, 100 * MIB)
    names = {"usage": ("memory.current", "memory.usage_in_bytes"), "limit": ("memory.max", "memory.limit_in_bytes")}
    for name in names.get(lost, ("memory.stat",)):
        path = tree.point / "job/step" / name
        if path.exists():
            path.unlink()
            path.mkdir()  # root reads whatever the mode says
    assert tree.available == (400 if lost == "stat" else 600) * MIB


def test_a_mount_point_may_have_a_space(grow: Grow) -> None:
    assert grow("/job", "/", "/my groups").memory("job", 500 * MIB, 100 * MIB).available == 400 * MIB


@pytest.mark.parametrize(("limit", "high"), [(None, 300), (500, 300), (300, 500)])
def test_memory_high_is_a_limit(tmp_path: Path, limit: int | None, high: int) -> None:
    most = None if limit is None else limit * MIB
    assert Tree(tmp_path, 2, "/job").memory("job", most, 100 * MIB, high=high * MIB).available == 200 * MIB


def test_in_a_hybrid_tree_the_hierarchy_of_the_controller_counts(tmp_path: Path) -> None:
    """Version 2 is mounted too, without controllers; each has a group of its own."""
    tree = Tree(tmp_path, 1, "/job", "/", "/sys/fs/cgroup/memory").memory("job", 500 * MIB, 100 * MIB)
    for name, line in {
        "cgroup": "0::/user.slice\n",
        "mountinfo": "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
    }.items():
        with (tmp_path / "proc/self" / name).open("a") as file:
            file.write(line)
    (tmp_path / "sys/fs/cgroup/unified/user.slice").mkdir(parents=True)
    assert tree.available == 400 * MIB


@pytest.mark.parametrize("text", ["", "0::", "nonsense", "0:memory", "31 23 0:28 / /x rw - cgroup2", "\udcff - cgroup"])
def test_files_that_say_nothing_limit_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    for name in ("cgroup", "mountinfo"):
        (tmp_path / "proc/self" / name).write_text(text, errors="surrogateescape")
    assert process_limits.available_memory_bytes(tmp_path) == MACHINE
    assert process_limits.cpu_quota(tmp_path) is None


# CPUs


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ((None, None), None),
        ((150_000, None), 1),  # rounded down
        ((50_000, None), 1),  # at least one
        ((400_000, 250_000), 2),
        ((250_000, 400_000), 2),
        ((None, 800_000), 8),
    ],
)
def test_the_least_quota_of_all_ancestors_counts(
    grow: Grow, quotas: tuple[int | None, int | None], expected: int | None
) -> None:
    tree = grow("/job/step").cpu("job", quotas[0]).cpu("job/step", quotas[1])
    assert process_limits.cpu_quota(tree.root) == expected


def cores(monkeypatch: pytest.MonkeyPatch, root: Path, n: int, allowed: set[int]) -> None:
    """A machine of n cores with two threads each, numbered as Linux does on Intel: thread i and i + n are one core."""
    for cpu in range(2 * n):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % n},{cpu % n + n}\n")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 2 * n if logical else n)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: allowed, raising=False)


@pytest.mark.parametrize(
    ("allowed", "quota", "n_cores", "threads", "cpus"),
    [
        (set(range(16)), None, 8, 7, 16),  # a whole machine: one core stays with the desktop
        ({3}, None, 1, 1, 1),
        ({3, 11}, None, 1, 1, 2),  # both threads of one core
        ({0, 1, 2, 3}, None, 4, 4, 4),  # others have the rest of the machine
        (set(range(8)), None, 8, 7, 8),  # one thread of each core
        (set(range(16)), 150_000, 8, 1, 1),
        (set(range(16)), 400_000, 8, 4, 4),
        (set(range(16)), 1_600_000, 8, 7, 16),
        ({0, 1, 2, 3}, 200_000, 4, 2, 2),
    ],
)
def test_threads_are_those_of_the_cores_that_a_process_may_use(
    monkeypatch: pytest.MonkeyPatch,
    grow: Grow,
    allowed: set[int],
    quota: int | None,
    n_cores: int,
    threads: int,
    cpus: int,
) -> None:
    tree = grow("/job").cpu("job", quota)
    cores(monkeypatch, tree.root, 8, allowed)
    assert process_limits.usable_cores(tree.root) == n_cores
    assert speed.default_threads(tree.root) == threads
    assert process_limits.usable_cpus(tree.root) == cpus


def test_no_more_threads_than_llama_cpp_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cores(monkeypatch, tmp_path, 1024, set(range(2048)))
    assert speed.default_threads(tmp_path) == 512


def test_without_topology_and_affinity_the_machines_cores_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8 if logical else None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1}, raising=False)
    assert process_limits.usable_cores(tmp_path) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(psutil.Process, "cpu_affinity", raising=False)
    assert (process_limits.usable_cores(tmp_path), speed.default_threads(tmp_path)) == (8, 7)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process")
def test_a_pinned_process_has_one_thread() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from qwq_lite.plan import speed; from qwq_lite.system import process_limits\n"
        "print(speed.default_threads(), process_limits.usable_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.split() == ["1", "1"]


def test_only_one_module_asks_how_much_there_is() -> None:
    """Whoever asks psutil or os themselves is told of the machine, and not of what this process may have of it."""
    machines_own = {"virtual_memory", "cpu_count", "sched_getaffinity", "process_cpu_count"}
    for path in [*REPOSITORY.glob("qwq_lite/**/*.py"), *REPOSITORY.glob("convert/**/*.py")]:
        names = {node.attr for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute)}
        assert path.name == "process_limits.py" or not names & machines_own, path
