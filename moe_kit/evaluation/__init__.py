"""Evaluation: greedy answers scored by the task's own scorer, the likelihood of the right answer, and baselines.

Importing this package loads no model code; each module imports torch inside its functions.
"""
