"""``python -m runner``: check an unpacked bundle, measure its artifacts on this machine, write the bench JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xformopt.bundle.runner.contents import Contents, read_contents
from xformopt.bundle.runner.remote import RemoteContest, describe_remote
from xformopt.errors import UsageError, XformoptError
from xformopt.measure.contest import BenchSettings, Candidate, Contest
from xformopt.measure.machine import describe_machine
from xformopt.measure.summary import summarize

__all__ = ["main"]

_ROOT = Path(__file__).resolve().parent.parent
# this package is `runner` in a bundle, and lies elsewhere in the tree it was made from
_PACKAGE = read_contents.__module__.rpartition(".")[0]


def main(arguments: Sequence[str] | None = None, root: Path = _ROOT) -> int:
    """Measure the bundle at ``root`` and return the exit status: 0 done, 1 a run failed or stopped, 2 usage."""
    options = _parser().parse_args(arguments)
    try:
        report = measure(read_contents(root), options)
    except XformoptError as error:
        print(f"runner: error: {error}", file=sys.stderr)
        return error.exit_status
    # written before it is shown: a terminal that closes must not cost the measurement
    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for run in report["runs"]:
        print(_line(run))
    print(f"wrote {options.json}")
    return 1 if any(run["error"] or run.get("partial") for run in report["runs"]) else 0


def measure(contents: Contents, options: argparse.Namespace) -> dict[str, Any]:
    """Return the bench JSON of the chosen artifacts; one that fails keeps its error, and the others go on.

    Raises:
        UsageError: nothing has a name that was asked for.

    """
    candidates = _chosen(contents.candidates, options.only)
    opener = "sessions" if options.rpc is None else "remote"
    settings = BenchSettings(
        threads=options.threads,
        rounds=options.rounds,
        seed=options.seed,
        timeout_seconds=options.timeout,
        open_runner=f"{_PACKAGE}.{opener}:open_runner",
        worker=f"{_PACKAGE.removesuffix('.bundle.runner')}.benchmark_worker",
    )
    machine: dict[str, Any]
    if options.rpc is None:
        machine, contest = {**describe_machine().to_dict(), "peaks": None}, Contest(candidates, settings, _say)
    else:
        machine = describe_remote(options.rpc, options.device)
        contest = RemoteContest(candidates, settings, _say, options.rpc)
    contest.hold(contents.inputs, contents.expected, contents.valid)
    return {
        "schema": "xformopt/bench/1",
        "machine": machine,
        "source": contents.source,
        "protocol": {
            **contest.protocol(reference_given=True),
            "reference": contents.reference,
            **({} if options.rpc is None else {"rpc": True, "process_per_run": False}),
        },
        "runs": summarize(contest, contents.inputs, peaks=None),
        "passes": [],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m runner", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("bench.json"), metavar="FILE", help="where the results go")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of every run; all usable cores otherwise")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds; chosen to last seconds otherwise")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="how long any one step may take")
    parser.add_argument("--rpc", metavar="HOST:PORT", help="run on the machine where a server of TVM's RPC answers")
    parser.add_argument("--device", metavar="NAME", help="what that machine is called in the results")
    parser.add_argument("--only", action="append", metavar="NAME", help="measure this artifact; may be repeated")
    return parser


def _chosen(candidates: Sequence[Candidate], names: Sequence[str] | None) -> list[Candidate]:
    known = [candidate.name for candidate in candidates]
    if unknown := [name for name in names or () if name not in known]:
        raise UsageError(f'the bundle holds no artifact "{unknown[0]}"; it holds {", ".join(known)}.')
    return [candidate for candidate in candidates if names is None or candidate.name in names]


def _say(stage: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{stage} {done}/{total}    ", end="" if done < total else "\n", file=sys.stderr, flush=True)


def _line(run: dict[str, Any]) -> str:
    if run["error"]:
        return f"{run['name']} ({run['target']}) failed: {run['error']}"
    latency, fidelity = run["latency_ms"], run["fidelity"]
    low, high = latency["ci95"] or (latency["p50"], latency["p50"])
    stopped = f"; {run['notes'][-1]}" if run.get("partial") else ""
    return (
        f"{run['name']} ({run['target']}, {run['precision']}): p50 {latency['p50']:.3f} ms "
        f"[{low:.3f}, {high:.3f}], relative L2 {fidelity['relative_l2']:.1e}{stopped}"
    )


if __name__ == "__main__":
    # the processes of the candidates find the runner beside this file
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    sys.exit(main())
