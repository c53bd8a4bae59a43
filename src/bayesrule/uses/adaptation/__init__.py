"""Knowledge that changes: examples are added or taken away, the prior or the architecture is another one."""
