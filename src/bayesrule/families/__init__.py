"""Families of distributions: what q may be."""
