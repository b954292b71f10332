"""What holds for every test."""

import signal

# Where the tests were started with SIGINT ignored, as in the background of a script, their child processes would
# inherit that, and not hear the Ctrl-C that some tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
