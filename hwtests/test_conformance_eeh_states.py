"""The conformance cases of that name, on a real kernel."""

from simtests.conformance.test_eeh_states import *  # noqa: F403
