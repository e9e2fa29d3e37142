from simtests.conformance.test_driver_core import *  # noqa: F403
