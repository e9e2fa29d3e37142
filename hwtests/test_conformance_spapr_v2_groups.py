"""The conformance cases of that name, on a real kernel."""

from simtests.conformance.test_spapr_v2_groups import *  # noqa: F403
