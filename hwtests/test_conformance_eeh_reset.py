"""The conformance cases of that name, on a real kernel."""

from simtests.conformance.test_eeh_reset import *  # noqa: F403
