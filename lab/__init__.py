"""A site on one Linux machine: hosts that are real but for their GPUs, and the mirrors they use."""


class LabError(Exception):
    """Something that a person has to know or do; its text is one line: where, what, what to do."""
