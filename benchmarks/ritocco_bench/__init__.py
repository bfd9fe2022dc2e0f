"""Benchmarks: cases, timing, peers, reports."""
