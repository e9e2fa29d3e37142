from simtests.conformance.test_sysfs_files import *  # noqa: F403
