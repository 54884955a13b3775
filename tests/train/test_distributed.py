"""What several processes need to come together, and what is said if they do not."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from train.distributed import is_first, join, meet, number_of, roll_call


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
        join(4, *options)


def test_a_coordinator_that_nobody_answers_at_is_one_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ValueError, match=f"--coordinator {address}: nobody answers there"):
        join(4, address, 2, 1, patience_s=0.5)


def _address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def _calls(address: str, *numbers: int, of: int, patience_s: float = 5.0) -> list[str | None]:
    """What each process is told: nothing, if all come together."""

    def one(number: int) -> str | None:
        try:
            roll_call(address, of, number, patience_s)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, numbers))


def test_processes_go_on_once_all_are_there():
    assert _calls(_address(), 2, 0, 1, of=3) == [None] * 3


def test_processes_that_do_not_come_are_named():
    first, second = _calls(_address(), 0, 2, of=4, patience_s=1)
    assert first is not None and "of 4 processes number 1, 3 did not come within 1 s" in first
    assert second is not None and "has given up" in second


def test_a_number_that_is_taken_is_refused():
    told = _calls(_address(), 0, 1, 1, of=3, patience_s=1.5)
    refused = [said for said in told[1:] if said is not None and "it is taken" in said]
    assert len(refused) == 1
    assert told[0] is not None and "number 2 did not come" in told[0]


def test_another_number_of_processes_is_refused():
    first, second = _calls(_address(), 0, 2, of=2, patience_s=1)[0], None
    assert first is not None and "number 1 did not come" in first
    address = _address()
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
    join(4)
    assert is_first()
    meet("here")


@pytest.mark.parametrize(
    ("variables", "given", "number"),
    [
        ({}, None, 0),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, None, 1),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, None, 3),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, 0, 0),
    ],
)
def test_a_process_knows_its_number_before_it_meets_the_others(
    variables, given, number, monkeypatch
):
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert number_of(given) == number
