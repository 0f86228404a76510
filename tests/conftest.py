"""For all tests: Ctrl-C ends them with their finalizers; dev/enter --finish has held it back until now."""

import signal

signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
