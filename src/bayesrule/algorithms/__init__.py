"""Algorithms that are the rule run to an end: closed forms and classics."""
