"""Code: functions to write or repair, graded by tests in a sandbox."""
