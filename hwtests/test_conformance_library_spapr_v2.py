"""The conformance cases of that name, on a real kernel."""

from simtests.conformance.test_library_spapr_v2 import *  # noqa: F403
