"""Readers of data as people have them: each turns a file or folder into a ``Collection``, or says in one line why not."""
