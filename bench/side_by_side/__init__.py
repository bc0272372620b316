"""What the benchmarks share: workers that take turns, the work that is counted, the rows, the report.

Contenders run in environments without lorasmith, so nothing here imports it, and torch only where it is used.
"""
