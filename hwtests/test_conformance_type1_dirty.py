"""The conformance cases of that name, on a real kernel."""

from simtests.conformance.test_type1_dirty import *  # noqa: F403
