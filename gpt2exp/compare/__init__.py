"""Runs to answers: pairs, intervals, verdicts, the page."""
