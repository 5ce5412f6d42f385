"""Slow brute-force twins, used by the tests."""
