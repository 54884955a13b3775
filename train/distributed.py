"""Several processes that train one model, over JAX's own runtime.

    srun or mpirun python -m train.pangu ...               found as JAX finds them
    python -m train.pangu --coordinator HOST:PORT --processes 2 --process-id 0|1 ...

Every process has as many of the mesh's devices as every other, reads the sequences of its own
ranks, and writes its part of a checkpoint. The first one prints, and writes the metrics.
"""

import contextlib
import os
import re
import socket
import time

import jax
from jax.experimental import multihost_utils

from cmjax.mesh import prepare_devices

PATIENCE_S = 60
"""How long a process waits for the coordinator, and the coordinator for all processes."""
_RANK_OF = (("SLURM_NTASKS", "SLURM_PROCID"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"))


def join(
    devices: int,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    patience_s: float = PATIENCE_S,
) -> None:
    """Start JAX with `devices` CPU devices over all processes; with one process, as ever.

    Args:
      devices: of the mesh, over all processes.
      coordinator: HOST:PORT of the first process. processes: how many there are. process_id: this
        one's number. All of them or none; without them SLURM's and Open MPI's variables tell.
      patience_s: how long the others are waited for.
    Raises: ValueError: some of the three, numbers that make no sense, devices that the processes do
      not divide, or a coordinator that nobody answers at.
    """
    given = {"coordinator": coordinator, "processes": processes, "process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise ValueError(
            f"--{missing[0]} is missing: --coordinator HOST:PORT, --processes and --process-id go "
            "together"
        )
    if not missing:
        assert coordinator is not None and processes is not None and process_id is not None
        _check(coordinator, processes, process_id)
    else:
        found = [(os.environ[size], name) for size, name in _RANK_OF if size in os.environ]
        processes = next(
            (int(size) for size, name in found if name in os.environ and size.isdecimal()), 1
        )
    if devices % processes:
        raise ValueError(f"{processes} processes do not divide the {devices} devices of the mesh")
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # A mesh takes the first devices that there are: each process has its share of it, no more.
        flags = os.environ.get("XLA_FLAGS", "")
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
        os.environ["XLA_FLAGS"] = flags.strip()
        if coordinator is not None and process_id is not None:
            roll_call(coordinator, processes, process_id, patience_s)
        try:
            jax.distributed.initialize(
                coordinator, None if missing else processes, process_id,
                initialization_timeout=max(1, int(patience_s)),
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            said = str(error).splitlines()[0][:200]
            raise ValueError(
                f"--coordinator {coordinator or '(of the cluster)'}: the {processes} processes did "
                f"not come together within {patience_s:.0f} s: {said}"
            ) from error
    prepare_devices(devices // processes)


def number_of(process_id: int | None) -> int:
    """This process's number, before the processes have met: as given, or as the launcher says."""
    if process_id is not None:
        return process_id
    ranks = (os.environ.get(rank, "") for size, rank in _RANK_OF if size in os.environ)
    return next((int(rank) for rank in ranks if rank.isdecimal()), 0)


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def meet(name: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


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


def roll_call(coordinator: str, processes: int, process_id: int, patience_s: float) -> None:
    """Return once all processes are there: each says its number to the first one, at the address
    that JAX's own service takes afterwards. JAX's client ends a process that waits in vain.

    Raises: ValueError: nobody answers, somebody else does, a process does not come, or another has
      its number.
    """
    until = time.monotonic() + patience_s
    if process_id:
        _answer(coordinator, processes, process_id, until, patience_s)
    else:
        _call(coordinator, processes, until, patience_s)


def _call(coordinator: str, processes: int, until: float, patience_s: float) -> None:
    port = int(coordinator.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    there: dict[int, socket.socket] = {}
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
            if said[:1] != [_GREETING] or len(said) != 3 or not "".join(said[1:]).isdecimal():
                continue  # somebody else, such as a port scan
            number, count = map(int, said[1:])
            if count != processes or number in there:
                why = f"there are {processes} processes" if count != processes else "it is taken"
                caller.sendall(f"no {why}\n".encode())
                continue
            there[number] = caller
        for caller in there.values():
            caller.sendall(b"go\n")


def _answer(
    coordinator: str, processes: int, process_id: int, until: float, patience_s: float
) -> None:
    host, _, port = coordinator.rpartition(":")
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=_BRIEF_S) as first:
                first.sendall(f"{_GREETING} {process_id} {processes}\n".encode())
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
    if said != "go":
        raise ValueError(
            f"--coordinator {coordinator}: what answers there is no process with --process-id 0, "
            "or it has given up; name another address"
        )


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


_GREETING = "cmjax-train"
_BRIEF_S = 5.0
