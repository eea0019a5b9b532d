"""Many runs: a plan says which, an engine does them, and whatever stops them, they go on.

``Plan.expand`` is pure: from a TOML file to a list of runs.  ``run_sweep`` does them on this
machine or on a Ray cluster.  Nothing here imports torch in the process that drives: only those that
work do.
"""

from lossprune.sweep.plan import Plan as Plan
from lossprune.sweep.plan import PlannedRun as PlannedRun
from lossprune.sweep.plan_file import PLANS as PLANS
from lossprune.sweep.plan_file import read_plan as read_plan

__all__ = ["PLANS", "Plan", "PlannedRun", "read_plan"]
