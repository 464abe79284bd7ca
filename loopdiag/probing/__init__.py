"""What linear probes read from the states of each loop: hooks, targets, control tasks, random weights."""

from loopdiag.probing.linear import Probe, fit_probe
from loopdiag.probing.probes import HOOKS, probe
from loopdiag.probing.reading import Reading
from loopdiag.probing.suites import SUITES, Target
from loopdiag.scores import ProbeScores, ScoreRow, ScoresError

__all__ = [
    "HOOKS",
    "SUITES",
    "Probe",
    "ProbeScores",
    "Reading",
    "ScoreRow",
    "ScoresError",
    "Target",
    "fit_probe",
    "probe",
]
