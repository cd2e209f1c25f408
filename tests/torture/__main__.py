"""`make torture`: runs the campaigns that are named, or all, and prints their table."""

import argparse
import sys
import time

from . import harness
from .campaigns import CAMPAIGNS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="campaign", help=", ".join(CAMPAIGNS))
    parser.add_argument("--seed", type=int, default=int(time.time()), help="repeats a run")
    parser.add_argument("--scale", type=float, default=1.0, help="1 does all of the goal")
    options = parser.parse_args()
    print(f"seed {options.seed}, scale {options.scale:g}", flush=True)
    results = []
    for name in options.names or CAMPAIGNS:
        campaign = CAMPAIGNS[name]
        tally = harness.carry_out(campaign, options.seed, options.scale)
        results.append((campaign, tally))
        print(f"{name}: {tally.did} {tally.figures}, {len(tally.wrong)} wrong", flush=True)
    print("\n".join(harness.lines(results)))
    return any(tally.wrong for _, tally in results)


sys.exit(main())
