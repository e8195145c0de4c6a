"""Benchmarks, on the real engines. Each says what it must at least take, and refuses a result that is below."""
