"""Several processes that run one program, over JAX's own runtime.

    srun or mpirun python -m train.pangu ...               found as JAX finds them
    python -m train.pangu --coordinator HOST:PORT --processes 2 --process-id 0|1 ...
    cmjax generate --coordinator HOST:PORT --processes 2 --process-id 0|1 ...

Every process has as many of the mesh's devices as every other, and reads and writes what its own
ranks hold. The first one prints, and writes what is written once. What every process makes for
itself, as an array of its own, a program on the mesh takes for the same on all of them.
"""

import contextlib
import dataclasses
import os
import re
import socket
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from cmjax.cores import keep_to_cores, name_of_cores, share_of_cores, usable_cores
from cmjax.mesh import RANKED, RankMesh, Spec, prepare_devices

PATIENCE_S = 60
"""How long a process waits for the coordinator, and the coordinator for all processes."""
_RANK_OF = (("SLURM_NTASKS", "SLURM_PROCID"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """Which processes run a program together: all three are given, or none."""

    coordinator: str | None = None
    """HOST:PORT of the first of several processes; SLURM and Open MPI need none."""
    processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """This process's number, from 0."""

    @property
    def first(self) -> bool:
        """Whether this process is the first, before the processes have met: as given, or as the
        launcher says."""
        if self.process_id is not None:
            return self.process_id == 0
        ranks = (os.environ.get(rank, "") for size, rank in _RANK_OF if size in os.environ)
        return next((int(rank) for rank in ranks if rank.isdecimal()), 0) == 0

    def join(self, devices: int) -> None:
        """Start JAX with `devices` CPU devices over all processes; with one process, as ever.

        Raises: ValueError: some of the three fields, numbers that make no sense, devices that the
          processes do not divide, or a coordinator that nobody answers at.
        """
        processes = self._count()
        if devices % processes:
            raise ValueError(
                f"{processes} processes do not divide the {devices} devices of the mesh"
            )
        if processes > 1:
            self._meet(processes)
        prepare_devices(devices // processes)

    def _count(self) -> int:
        given = {
            "coordinator": self.coordinator,
            "processes": self.processes,
            "process-id": self.process_id,
        }
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < 3:
            raise ValueError(
                f"--{missing[0]} is missing: --coordinator HOST:PORT, --processes and --process-id "
                "go together"
            )
        if missing:
            found = [(os.environ[size], name) for size, name in _RANK_OF if size in os.environ]
            sizes = (size for size, name in found if name in os.environ and size.isdecimal())
            return int(next(sizes, "1"))
        assert self.coordinator is not None and self.process_id is not None
        assert self.processes is not None
        _check(self.coordinator, self.processes, self.process_id)
        return self.processes

    def _meet(self, processes: int) -> None:
        if self.coordinator is not None and self.process_id is not None:
            place, count = roll_call(self.coordinator, processes, self.process_id, PATIENCE_S)
            keep_to_cores(share_of_cores(usable_cores(), place, count))
        _keep_stdout_for_python()
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # A mesh takes the first devices that there are: each process has its share of it, no more.
        flags = os.environ.get("XLA_FLAGS", "")
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
        os.environ["XLA_FLAGS"] = flags.strip()
        try:
            jax.distributed.initialize(
                self.coordinator, self.processes, self.process_id,
                initialization_timeout=max(1, int(PATIENCE_S)),
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            said = str(error).splitlines()[0][:200]
            raise ValueError(
                f"--coordinator {self.coordinator or '(of the cluster)'}: the {processes} "
                f"processes did not come together within {PATIENCE_S:.0f} s: {said}"
            ) from error


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def of_first(console: Console) -> Console:
    """The console of the first process; that of another says nothing."""
    return console if is_first() else Console(quiet=True)


def meet(name: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def of_every_process(number: int) -> list[int]:
    """What every process gives, in their order; all of them call."""
    if jax.process_count() == 1:
        return [number]
    own = np.frombuffer(np.int64(number).tobytes(), np.uint8)  # JAX has no int64 by default
    everyone = multihost_utils.process_allgather(own)
    return np.ascontiguousarray(everyone).view(np.int64).reshape(-1).tolist()


def own_rows(rows: int) -> slice:
    """Of `rows` in the order of the ranks, those of this process's ranks."""
    each = rows // jax.process_count()
    return slice(jax.process_index() * each, (jax.process_index() + 1) * each)


def from_rows(own: Any, mesh: RankMesh) -> Any:
    """Arrays over the nodes of a mesh, of the rows that each process has (`own_rows`)."""
    where = NamedSharding(mesh.concrete(), PartitionSpec("node"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, x), own)


def on_mesh(x: Any, mesh: RankMesh, spec: Spec) -> jax.Array:
    """An array, which every process has, on a mesh: `RANKED`, each rank its entry."""
    # from NumPy: JAX moves an array of one device to many slowly
    whole = np.asarray(x)
    axes = PartitionSpec("node") if spec is RANKED else PartitionSpec()
    where = NamedSharding(mesh.concrete(), axes)
    return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])


def on_host(tree: Any) -> Any:
    """Arrays of a mesh as NumPy's, whole on every process; all of them call."""

    def local(x) -> bool:
        return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated

    if all(map(local, jax.tree.leaves(tree))):
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def roll_call(
    coordinator: str, processes: int, process_id: int, patience_s: float
) -> tuple[int, int]:
    """Return once all processes are there: each says its number and its cores to the first one, at
    the address that JAX's own service takes afterwards. JAX's client ends a process that waits in
    vain.

    Returns: this process's place among those that may use the same cores, and how many these are.
    Raises: ValueError: nobody answers, somebody else does, a process does not come, or another has
      its number.
    """
    until = time.monotonic() + patience_s
    if process_id:
        return _answer(coordinator, processes, process_id, until, patience_s)
    return _call(coordinator, processes, until, patience_s)


def _keep_stdout_for_python() -> None:
    """Gloo writes to standard output that it is connected, where results are to be alone: what is
    not written by Python goes to standard error from now on."""
    out = sys.stdout
    if out is None or out is not sys.__stdout__ or out.fileno() != 1:
        return
    out.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(
        own, "w", buffering=1 if out.isatty() else -1, encoding=out.encoding, errors=out.errors
    )


def _check(coordinator: str, processes: int, process_id: int) -> None:
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"--coordinator must be HOST:PORT, got {coordinator!r}")
    if processes < 1:
        raise ValueError(f"--processes must be at least 1, got {processes}")
    if not 0 <= process_id < processes:
        raise ValueError(
            f"--process-id must be 0 to {processes - 1} for {processes} processes, got {process_id}"
        )


def _call(coordinator: str, processes: int, until: float, patience_s: float) -> tuple[int, int]:
    port = int(coordinator.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    there: dict[int, socket.socket] = {}
    cores = {0: name_of_cores()}
    with contextlib.ExitStack() as opened:
        try:
            server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
        except OSError as error:
            raise ValueError(
                f"--coordinator {coordinator}: the port cannot be listened on ({error.strerror}); "
                "name another one"
            ) from None
        opened.enter_context(server)
        while missing := [str(n) for n in range(1, processes) if n not in there]:
            try:
                server.settimeout(max(0.01, until - time.monotonic()))
                caller = opened.enter_context(server.accept()[0])
            except TimeoutError:
                raise ValueError(
                    f"--coordinator {coordinator}: of {processes} processes number "
                    f"{', '.join(missing)} did not come within {patience_s:.0f} s; start each with "
                    "the same --coordinator and --processes"
                ) from None
            said = _line(caller, _BRIEF_S).split()
            if said[:1] != [_GREETING] or len(said) != 4 or not "".join(said[1:3]).isdecimal():
                continue  # somebody else, such as a port scan
            number, count = map(int, said[1:3])
            if count != processes or number in there:
                why = f"there are {processes} processes" if count != processes else "it is taken"
                caller.sendall(f"no {why}\n".encode())
                continue
            there[number], cores[number] = caller, said[3]
        for number, caller in there.items():
            caller.sendall("go {} {}\n".format(*_place(number, cores)).encode())
    return _place(0, cores)


def _place(number: int, cores: dict[int, str]) -> tuple[int, int]:
    """The place of a process among those whose cores have the same name, and their number."""
    same = sorted(other for other, name in cores.items() if name == cores[number])
    return same.index(number), len(same)


def _answer(
    coordinator: str, processes: int, process_id: int, until: float, patience_s: float
) -> tuple[int, int]:
    host, _, port = coordinator.rpartition(":")
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=_BRIEF_S) as first:
                first.sendall(f"{_GREETING} {process_id} {processes} {name_of_cores()}\n".encode())
                said = _line(first, max(_BRIEF_S, until - time.monotonic()))
            break
        except OSError as error:
            if time.monotonic() > until:
                raise ValueError(
                    f"--coordinator {coordinator}: nobody answers there after {patience_s:.0f} s "
                    f"({error.strerror or error}); start the process with --process-id 0 on that "
                    "host, or name another address"
                ) from None
            time.sleep(0.2)
    if said.startswith("no "):
        raise ValueError(
            f"--process-id {process_id} of --processes {processes}: the first process says that "
            f"{said[3:]}"
        )
    told = said.split()
    if told[:1] != ["go"] or len(told) != 3 or not "".join(told[1:]).isdecimal():
        raise ValueError(
            f"--coordinator {coordinator}: what answers there is no process with --process-id 0, "
            "or it has given up; name another address"
        )
    return int(told[1]), int(told[2])


def _line(peer: socket.socket, patience_s: float) -> str:
    """What the other says, up to the end of a short line; less, if no more comes."""
    peer.settimeout(patience_s)
    said = b""
    try:
        while not said.endswith(b"\n") and len(said) < 100 and (more := peer.recv(100)):
            said += more
    except OSError:
        pass
    return said.decode(errors="replace").strip()


_GREETING = "cmjax"
_BRIEF_S = 5.0
