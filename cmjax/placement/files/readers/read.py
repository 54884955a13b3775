"""Recorded expert loads from a file or a folder: one workload, or a family of them.

Recorders write many shapes of file. Whatever cannot be read is refused in one line that names the
file, what was found and what is expected.
"""

import fnmatch
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from cmjax.inputs import read_arrays
from cmjax.placement.files.readers.arrays import is_pairs, read_npy, read_npz
from cmjax.placement.files.readers.documents import read_json, read_jsonl
from cmjax.placement.files.readers.scenario import Counts, NoRecordingError, Scenarios, summed
from cmjax.placement.files.readers.tables import read_csv
from cmjax.placement.files.readers.tensors import read_pt
from cmjax.placement.loads import Loads
from cmjax.placement.routes import Routes

_READERS: dict[str, Callable[[Path, str | None, int | None], Scenarios]] = {
    ".npy": read_npy,
    ".npz": read_npz,
    ".csv": read_csv,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".pt": read_pt,
}
_SUFFIXES = ".npy, .npz, .csv or .json"
_MORE = ".jsonl and .pt are read too"
_RANK = re.compile(
    r"[-_.]?(?:tp|ep|dp|moe)?[-_.]?rank[-_.]?(\d+)|(?<=^expert_distribution_recorder_)[\d.]+_(\d+)$"
)
_TIME = re.compile(r"[-_.]?(?:timestamp|time)[-_.]?[\d.]+")
_LISTED = 12  # domains named in a message


def read_loads(
    path: str | Path, *, windows: int = 1, experts: int | None = None, domain: str | None = None
) -> Loads:
    """Read one workload's expert loads.

    Args:
      path: a folder of recordings, or one of
        `.npy`: an array of shape [layers, experts] or [windows, layers, experts];
        `.npz`: the same, as its only array of two or three axes or named `counts` or `loads` (else
          `file.npz:key`), with layer numbers as `layers` and window names as `workload` or
          `domain`; several arrays of one shape are a domain each; `freq` with `category` is a
          domain per category; or token-level routes named `ids`, integers [layers, tokens, top_k]
          or [tokens, layers, top_k] (the longer axis is the tokens), counted per window. Routes
          with `doc` take their domains from the column category of a `docs.csv` in the same
          folder;
        `.csv`: rows = layers, columns = experts, no header; or long form with the columns layer,
          expert, hits or count, and optionally window and domain (others are ignored);
          layer_id, expert_id, count of SGLang's older recorder may leave out rows of 0;
        `.json`: nested lists of the array shapes, or an object with one of the keys counts, loads,
          expert_popularity, weight, logical_count (SGLang's), whose value may be an object of
          domains; another key is chosen by `file.json:key`;
        `.jsonl`: a window, or a row of layer, expert and count, in every line;
        `.pt`: what SGLang's recorder saves, where PyTorch is installed.
        Dense layers, all zero in SGLang's `logical_count`, are left out. Files of a folder that
        differ in a rank's number only are added. `FOLDER:NAME` or `FILE:NAME` chooses a domain.
      windows: equal stretches of tokens to count separately, for token-level routes; of counts
        with more windows, so many stretches of neighbouring ones, added.
      experts: experts per layer, for token-level routes only (default: the largest id + 1, which
        is too few if the last expert is never chosen).
      domain: which of several workloads, by name or by a pattern such as `*/law`. Without one, a
        file of routes is counted whole.
    Raises: ValueError of one line: the file, what was found, what is expected; where there are
      several workloads, their names.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "loads.csv").write_text("30,10,20,40\\n25,25,25,25\\n")
    ...     loads = read_loads(f"{folder}/loads.csv")
    >>> loads.layers, loads.experts
    (2, 4)
    """
    scenarios = _scenarios(path, experts)
    if domain is None and len(scenarios) == 1:
        (recorded,) = scenarios.values()
        return _loads(recorded, windows, experts)
    found = _matching(_split(scenarios), domain, path)
    if len(found) > 1:
        raise ValueError(
            f"{path}: found {len(found)} workloads: {_names(found)}; choose one by its domain"
        )
    (recorded,) = found.values()
    return _loads(recorded, windows, experts)


def read_family(
    path: str | Path, *, windows: int = 1, experts: int | None = None, domain: str | None = None
) -> dict[str, Loads]:
    """Read all workloads of a file or folder, or those whose name matches the pattern `domain`.

    Arguments are those of `read_loads`. In a folder a workload is named after its file, and after
    file and domain (`routing/virology`) where the file holds several.

    Raises: ValueError, also if the workloads differ in layers or experts: a family is placed once.
    """
    found = _matching(_split(_scenarios(path, experts)), domain, path)
    family = {name: _loads(recorded, windows, experts) for name, recorded in found.items()}
    models = {(loads.layers, loads.experts, loads.layer_labels): name
              for name, loads in reversed(family.items())}  # fmt: skip
    if len(models) > 1:
        listed = "; ".join(
            f"{name} has {layers} layers x {experts} experts"
            for (layers, experts, _), name in reversed(models.items())
        )
        raise ValueError(
            f"{path}: expected workloads of one model, with the same layers, found {listed}; "
            f"choose some by their domain, such as {next(iter(family)).partition('/')[0]}*"
        )
    return family


def domains(path: str | Path) -> tuple[str, ...]:
    """Names of the workloads that `read_family` would read; ("",) for one without a name."""
    return tuple(_split(_scenarios(path, None)))


def read_routes(
    path: str | Path, *, experts: int | None = None, domain: str | None = None
) -> Routes:
    """Read token-level routes, whole or of one domain.

    Raises: ValueError of one line, also for a recording of counts only.
    """
    scenarios = _scenarios(path, experts)
    if domain is not None or len(scenarios) != 1:
        scenarios = _matching(_split(scenarios), domain, path)
        if len(scenarios) > 1:
            raise ValueError(
                f"{path}: found {len(scenarios)} workloads: {_names(scenarios)}; choose one by its "
                f"domain"
            )
    (routes,) = scenarios.values()
    if not isinstance(routes, Routes):
        raise ValueError(f"{routes.source}: expected token-level routes (`ids`), found counts only")
    return routes


def read_pairs(path: str | Path) -> dict[str, Float[np.ndarray, "steps experts experts"]]:
    """Read pair counts between successive recorded layers, by domain, from an `.npz` of them.

    `[s, e, f]` counts the choices of expert e at a recorded layer and f at the next recorded one.
    What is a pair is the recorder's matter: OLMoE's pairs choices of the same rank in the sorted
    top-k only, unlike `Routes.transitions`, which pairs all.

    Raises: ValueError of one line for a file that holds anything else, or negative counts.
    """
    file = Path(path)
    if file.suffix.lower() != ".npz" or not file.is_file():
        raise ValueError(f"{path}: expected an .npz file of pair counts, found no such file")
    arrays = read_arrays(file)
    if not is_pairs(arrays):
        raise ValueError(
            f"{path}: expected arrays [steps, experts, experts], found "
            f"{', '.join(f'{name} {array.shape}' for name, array in arrays.items()) or 'none'}"
        )
    for name, array in arrays.items():
        if array.dtype.kind not in "iuf" or not (array >= 0).all() or np.isinf(array).any():
            raise ValueError(f"{path}: expected finite counts of 0 or more in {name}, found others")
    return {name: array.astype(np.float64) for name, array in arrays.items()}


def _scenarios(path: str | Path, experts: int | None) -> Scenarios:
    """All recordings of a file, or of a folder with what is below it, by name."""
    if not str(path).strip():
        raise ValueError("the file or folder of loads has no name; give `.` for the current folder")
    place, name = _chosen(path)
    if place.is_dir():
        found = _of_folder(place, experts)
        return found if name is None else _matching(_split(found), name, place)
    reader = _READERS.get(place.suffix.lower())
    if reader is None:
        what = repr(place.suffix) if place.suffix else "no suffix"
        raise ValueError(f"{path}: expected a {_SUFFIXES} file, found {what}; {_MORE}")
    if not place.is_file():
        raise ValueError(f"{path}: no such file of loads")
    if name is None:
        return reader(place, None, experts)
    try:
        return reader(place, name, experts)
    except ValueError as error:  # no key, but a domain?
        try:
            return _matching(_split(reader(place, None, experts)), name, place)
        except ValueError:
            raise error from None


def _chosen(path: str | Path) -> tuple[Path, str | None]:
    """The file or folder, and what `:NAME` behind it chooses; names may have slashes in them."""
    whole, text = Path(path), str(path)
    if whole.exists():
        return whole, None
    for colon in re.finditer(":", text):
        place = Path(text[: colon.start()])
        if colon.end() < len(text) and (place.is_file() or place.is_dir()):
            return place, text[colon.end() :]
    missing = re.fullmatch(r"(.+\.(?:npz|json)):([^/\\]+)", text, re.IGNORECASE)
    return (Path(missing[1]), missing[2]) if missing else (whole, None)


def _of_folder(folder: Path, experts: int | None) -> Scenarios:
    """Recordings of all files, what ranks of one run counted added; the others are passed over."""
    found: dict[str, Counts | Routes] = {}
    ranks: dict[str, list[Counts]] = {}
    passed = []
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() not in _READERS or not file.is_file():
            continue
        try:
            scenarios = _READERS[file.suffix.lower()](file, None, experts)
        except NoRecordingError as error:
            passed.append(str(error))
            continue  # a list of documents, say; a damaged recording is not passed over
        name = str(file.relative_to(folder).with_suffix(""))
        run = _TIME.sub("", _RANK.sub("", name)) if _RANK.search(name) else None
        for of, value in scenarios.items():
            if run is not None and isinstance(value, Counts):
                run_of = f"{run}/{of}" if run and of else run or of or folder.name
                ranks.setdefault(run_of, []).append(value)
            else:
                found[f"{name}/{of}" if of else name] = value
    for run, parts in ranks.items():
        many = f"{folder} ({run}, {len(parts)} files added)"
        found[run] = parts[0] if len(parts) == 1 else summed(parts, many)
    if not found:
        why = "".join(f"; {reason}" for reason in passed[:3])
        more = f"; and {len(passed) - 3} more" if len(passed) > 3 else ""
        raise ValueError(
            f"{folder}: expected {_SUFFIXES} files of expert loads, found none{why}{more}"
        )
    return found


def _split(scenarios: Scenarios) -> Scenarios:
    """Routes that tell domains apart become one workload per domain."""
    split: dict[str, Counts | Routes] = {}
    for name, recorded in scenarios.items():
        parts = recorded.by_domain() if isinstance(recorded, Routes) else {}
        named = {f"{name}/{of}" if name else of: part for of, part in parts.items()}
        split |= named or {name: recorded}
    return split


def _matching(scenarios: Scenarios, domain: str | None, path: str | Path) -> Scenarios:
    if domain is None:
        return scenarios
    found = {
        name: recorded
        for name, recorded in scenarios.items()
        if fnmatch.fnmatchcase(name, domain) or name.rpartition("/")[2] == domain
    }
    if not found:
        raise ValueError(f"{path}: found no domain {domain!r} among {_names(scenarios)}")
    return found


def _names(scenarios: Scenarios) -> str:
    names = [name or "(unnamed)" for name in scenarios]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _loads(recorded: Counts | Routes, windows: int, experts: int | None) -> Loads:
    if isinstance(recorded, Routes):
        return recorded.loads(windows)
    loads = recorded.loads()
    if windows == 1 and experts is None:
        return loads
    if experts is not None or not 1 <= windows <= len(loads.counts):
        raise ValueError(
            f"{loads.source}: windows and experts apply to token-level routes (`ids`), "
            f"found counts of {len(loads.counts)} windows"
        )
    parts = np.array_split(loads.counts, windows)
    return replace(loads, counts=np.stack([part.sum(0) for part in parts]), window_names=None)
