"""The conformance cases of that name, on a real kernel."""

from simtests.conformance.test_spapr_v2_accounting import *  # noqa: F403
