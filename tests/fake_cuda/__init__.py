"""The whole step on GPUs that are none, see host_waits.py; the tests compile what they need."""
