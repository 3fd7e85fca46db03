"""The benchmarks' reader of compiled programs: which collectives they have."""

from benchmarks.common.hlo import Collective as Collective, collectives as collectives
