"""The benchmarks' reader of compiled programs: which collectives they have."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from hlo import Collective as Collective, collectives as collectives
