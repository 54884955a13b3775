"""What several processes need to come together, and what is said if they do not."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cmjax import processes
from cmjax.cores import share_of_cores, usable_cores
from cmjax.mesh import RANKED, REPLICATED, RankMesh
from cmjax.processes import (
    ProcessGroup,
    from_rows,
    is_first,
    meet,
    of_every_process,
    on_host,
    on_mesh,
    own_rows,
    roll_call,
)
from tests.together import free_address, run_together


@pytest.mark.parametrize(
    "options, says",
    [
        (("host:1", None, None), "--processes is missing"),
        ((None, 2, 0), "--coordinator is missing"),
        (("host", 2, 0), "--coordinator must be HOST:PORT, got 'host'"),
        (("host:99999", 2, 0), "--coordinator must be HOST:PORT"),
        (("host:1", 2, 2), "--process-id must be 0 to 1 for 2 processes, got 2"),
        (("host:1", 0, 0), "--processes must be at least 1, got 0"),
        (("host:1", 3, 1), "3 processes do not divide the 4 devices"),
    ],
)
def test_options_that_make_no_run_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        _group(*options).join(4)


def _group(coordinator: str | None, count: int | None, number: int | None) -> ProcessGroup:
    return ProcessGroup(coordinator=coordinator, processes=count, process_id=number)


def test_a_coordinator_that_nobody_answers_at_is_one_line(monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE_S", 0.5)
    address = free_address()
    with pytest.raises(ValueError, match=f"--coordinator {address}: nobody answers there"):
        _group(address, 2, 1).join(4)


def _calls(address: str, *numbers: int, of: int, patience_s: float = 5.0) -> list:
    """What each process is told: its place and how many it shares cores with, if all come
    together; else why not."""

    def one(number: int):
        try:
            return roll_call(address, of, number, patience_s)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, numbers))


def test_processes_go_on_once_all_are_there():
    assert _calls(free_address(), 2, 0, 1, of=3) == [(2, 3), (0, 3), (1, 3)]


def test_processes_of_other_machines_or_cores_are_not_counted(monkeypatch):
    names = iter(["a", "b", "a", "b"])
    monkeypatch.setattr(processes, "name_of_cores", lambda: next(names))
    found = _calls(free_address(), 0, 1, 2, 3, of=4)
    assert sorted(found) == [(0, 2), (0, 2), (1, 2), (1, 2)]


def test_processes_of_one_machine_share_its_cores_out():
    """Those that this test may use; the same again with one core, which all of them take."""
    cores = usable_cores()
    said = run_together("tests.print_cores", [])
    first, second = (json.loads(line) for line in said)
    if len(cores) == 1:
        assert first == second == cores
    else:
        assert first + second == cores and min(len(first), len(second)) == len(cores) // 2


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("cores", [[0], [0, 1], list(range(3, 19))])
def test_shares_are_as_even_as_can_be_and_leave_no_core_idle(cores, count):
    shares = [share_of_cores(cores, place, count) for place in range(count)]
    sizes = {len(share) for share in shares}
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    assert {core for share in shares for core in share} == set(cores)
    if count <= len(cores):
        assert [core for share in shares for core in share] == cores


def test_processes_that_do_not_come_are_named():
    first, second = _calls(free_address(), 0, 2, of=4, patience_s=1)
    assert first is not None and "of 4 processes number 1, 3 did not come within 1 s" in first
    assert second is not None and "has given up" in second


def test_a_number_that_is_taken_is_refused():
    told = _calls(free_address(), 0, 1, 1, of=3, patience_s=1.5)
    refused = [said for said in told[1:] if said is not None and "it is taken" in said]
    assert len(refused) == 1
    assert told[0] is not None and "number 2 did not come" in told[0]


def test_another_number_of_processes_is_refused():
    first, second = _calls(free_address(), 0, 2, of=2, patience_s=1)[0], None
    assert first is not None and "number 1 did not come" in first
    address = free_address()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(_calls, address, 0, of=2, patience_s=1)
        second = _calls(address, 1, of=4, patience_s=1)[0]
        waiting.result()
    assert second is not None and "there are 2 processes" in second


def test_somebody_else_who_answers_is_no_coordinator():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with ThreadPoolExecutor() as pool:
            told = pool.submit(_calls, address, 1, of=2, patience_s=1)
            other.accept()[0].close()
            (said,) = told.result()
    assert said is not None and "is no process with --process-id 0" in said


def test_a_port_in_use_is_refused():
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as other:
        (said,) = _calls(f"127.0.0.1:{other.getsockname()[1]}", 0, of=2, patience_s=1)
    assert said is not None and "the port cannot be listened on" in said


def test_one_process_is_the_first_and_waits_for_nobody():
    ProcessGroup().join(4)
    assert is_first()
    meet("here")
    assert of_every_process(2**40) == [2**40]


@pytest.mark.parametrize(
    ("variables", "given", "first"),
    [
        ({}, None, True),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, None, False),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, None, False),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, 0, True),
    ],
)
def test_a_process_knows_whether_it_is_the_first_before_it_meets_the_others(
    variables, given, first, monkeypatch
):
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ProcessGroup(process_id=given).first is first


@pytest.mark.parametrize("spec", [RANKED, REPLICATED])
def test_an_array_comes_back_from_the_mesh_as_it_went_there(spec):
    mesh, values = RankMesh(2, 2), np.arange(12.0).reshape(4, 3)
    placed = on_mesh(values, mesh, spec)
    assert placed.sharding.shard_shape(placed.shape) == ((2, 3) if spec is RANKED else (4, 3))
    np.testing.assert_array_equal(on_host({"a": placed})["a"], values)


def test_the_rows_of_the_only_process_are_all_of_them():
    mesh, values = RankMesh(2, 2), np.arange(12.0).reshape(4, 3)
    assert values[own_rows(4)].shape == (4, 3)
    np.testing.assert_array_equal(from_rows(values, mesh), values)
